"""What the audit found in the data: a table of findings, the gravest first."""
from __future__ import annotations

from collections.abc import Sequence

from dpo_dist.report.markup import Markup, badge, details, joined, markup, paragraph, table
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles
from dpo_dist.report.shown import counted, percent, plain

SHOWN_EXAMPLES = 10
LEVELS = ("error", "warning", "info")


def audit_section(runs: Sequence[RunFiles]) -> Section | None:
    """None where no run's data was audited. Runs with the same audit share a table."""
    groups: list[tuple[Row, list[str]]] = []
    for run in runs:
        if run.audit is not None:
            same = next((names for audit, names in groups if _findings(audit) == _findings(run.audit)), None)
            if same is None:
                groups.append((run.audit, [run.name]))
            else:
                same.append(run.name)
    if not groups:
        return None
    parts = [paragraph("What the audit saw in the pairs before training. An error or a warning is worth a look before "
                       "the next run; info is no alarm.")]
    for audit, names in groups:
        if len(runs) > 1:
            parts.append(markup("<h3>{}</h3>", ", ".join(names)))
        parts.append(_audit(audit))
    return Section("audit", "Audit of the data", joined(parts), ())


def by_gravity(audit: Row) -> list[Row]:
    return sorted(_findings(audit), key=lambda f: (LEVELS.index(f["severity"]) if f.get("severity") in LEVELS else 9,
                                                   -(f.get("count") or 0)))


def _findings(audit: Row) -> list[Row]:
    return audit.get("findings") or []


def _audit(audit: Row) -> Markup:
    findings = by_gravity(audit)
    counts = [counted(n, name) for level, name in (("error", "error"), ("warning", "warning"), ("info", "note"))
              if (n := sum(f.get("severity") == level for f in findings))]
    rows, pairs = plain(audit.get("rows")), plain(audit.get("pairs"))
    parts = [paragraph(f"{rows} rows, {pairs} pairs: {', '.join(counts) or 'nothing found'}.")]
    if findings:
        parts.append(table(["", "kind", "count", "share", "what it means, and what to do", "where"],
                           [_row(finding) for finding in findings], "Findings of the audit",
                           ("", "", "n", "n", "words", ""), stacks=True))
    if looked := audit.get("looked_at"):
        parts.append(details("What was looked at", table(["", ""], looked.items(), "What was looked at",
                                                         ("", "words"))))
    return joined(parts)


def _row(finding: Row) -> list[object]:
    examples = [str(where) for where in finding.get("examples") or []]
    more = [markup("<span class=\"note\">and more in audit.json</span>")] if len(examples) > SHOWN_EXAMPLES else []
    where = details(counted(len(examples), "example"), joined(
        [*(markup("<code>{}</code>", one) for one in examples[:SHOWN_EXAMPLES]), *more], "<br>")
    ) if examples else Markup("")
    severity = str(finding.get("severity"))
    return [badge(severity if severity in LEVELS else "info", severity), markup("<code>{}</code>", finding.get("kind")),
            plain(finding.get("count")), percent(finding.get("share")),
            markup("{} <em>{}</em>", finding.get("meaning") or "", finding.get("remedy") or ""), where]
