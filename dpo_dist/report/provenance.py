"""Where the numbers come from: the command to repeat them, digests and versions, the whole configuration, the rows."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.report.markup import NOTHING, Markup, details, joined, markup, paragraph, table
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import RunFiles
from dpo_dist.report.shown import NONE

FIRST = ("policy_weights", "reference_weights", "train_pairs", "eval_pairs", "dtype", "ranks", "device", "hardware",
         "versions.dpo-dist", "versions.torch", "code.", "parent")     # keys that are shown at once
MOST_KEYS = 400                          # of a table: a long list of files is cut, and said to be


def provenance_section(runs: Sequence[RunFiles]) -> Section:
    parts = [_commands(runs)]
    passports = [flat(run.passport) for run in runs]
    if any(passports):
        parts.append(paragraph("Digests of what went in, and versions of what computed. dpo-dist verify computes the "
                               "digests again and says what changed."))
        first = [{key: value for key, value in passport.items() if key.startswith(FIRST)} for passport in passports]
        parts.append(_side_by_side(first, runs, "Provenance"))
        if first != passports:
            parts.append(details("All of the provenance", _side_by_side(passports, runs, "All of the provenance")))
    configs = [flat(run.config) for run in runs]
    if any(configs):
        if len(runs) > 1:
            differing = [{key: value for key, value in config.items()
                          if any(other.get(key) != value for other in configs)} for config in configs]
            parts.append(markup("<h3>Where the configurations differ</h3>{}",
                                _side_by_side(differing, runs, "Differences") if any(differing)
                                else paragraph("Nowhere.")))
        parts.append(details("The whole configuration", _side_by_side(configs, runs, "Configuration")))
    for run in runs:
        if run.data_summary:
            parts.append(details(f"{run.name}: what became of the rows" if len(runs) > 1 else "What became of the rows",
                                 markup("<pre>{}</pre>", run.data_summary)))
    return Section("provenance", "Where this comes from", joined(parts), ())


def _commands(runs: Sequence[RunFiles]) -> Markup:
    found = [markup("{}<pre>{}</pre>", markup("<h4>{}</h4>", run.name) if len(runs) > 1 else NOTHING, run.command)
             for run in runs if run.command]
    return markup("<h3>To train the same again</h3>{}", joined(found)) if found else paragraph(
        "The command was not kept (command.txt is missing); the configuration below is all of it.", "note")


def flat(found: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """{"a.b": value as text} of nested values."""
    out: dict[str, str] = {}
    for key, value in found.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            out |= flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for i, one in enumerate(value):
                out |= flat(one, f"{name}[{i}].") if isinstance(one, Mapping) else {f"{name}[{i}]": str(one)}
        else:
            out[name] = NONE if value is None else str(value)
    return out


def _side_by_side(found: Sequence[Mapping[str, str]], runs: Sequence[RunFiles], label: str) -> Markup:
    keys = list(dict.fromkeys(key for one in found for key in one))
    cut = paragraph(f"{len(keys) - MOST_KEYS:,} more are in run.json.", "note") if len(keys) > MOST_KEYS else NOTHING
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", ""]
    return joined([table(head, [[markup("<code>{}</code>", key), *(one.get(key, NONE) for one in found)]
                                for key in keys[:MOST_KEYS]], label, ("", *["words"] * len(runs)),
                         stacks=len(runs) == 1), cut])
