"""`dpo-dist audit`, and the first stage of `run`: looks at all pairs once, and writes <run.dir>/audit.json."""
from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from dpo_dist.audit.findings import SEVERITIES, reaches
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import TOKENS, deciding, to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.alone import run_alone
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.without_torch import torch_hidden

VERSION = 1                                  # raise it when the same data would give other findings
EXAMPLES_SHOWN = 2


def audit(config: RunConfig, terminal: Terminal) -> None:
    """Writes audit.json, unless it is there and of the same inputs, and shows it. UserError where a finding reaches
    audit.fail_on."""
    if not config.data.train and not config.data.eval:
        raise UserError("data.train=[] names no data; set data.train=[{path: rows.jsonl}]")
    with torch_hidden():
        from dpo_dist.models.tokenizer import load_tokenizer, tokenizer_folder

        folder = tokenizer_folder(config.model.path, "model.path", config.run.offline)
        tokenizer = load_tokenizer(folder)
    file, inputs = RunDir(config.run_dir).audit_json, inputs_digest(config, tokenizer, folder)
    found = _earlier(file, inputs)
    if found is not None:
        terminal.say(f"audit: these data were audited before, {_summary(found)}; see {file}")
    else:
        found = audited(config, tokenizer, folder, terminal)
        write_json(file, sealed({**found, "inputs": inputs}))
        show(found, terminal)
        terminal.say(f"audit: {found['pairs']:,} pairs in {found['seconds']:.1f} s, {_summary(found)}; written to "
                     f"{file}")
    _stop(config, found, file)


def audited(config: RunConfig, tokenizer: Any | None, folder: Path, terminal: Terminal) -> dict[str, Any]:
    """What an audit finds, as audit.json holds it. folder: of the tokenizer."""
    from dpo_dist.audit.examine import examine
    from dpo_dist.audit.processes import read_all
    from dpo_dist.audit.reading import sources_of
    from dpo_dist.data.prepare import store_folder
    from dpo_dist.models.file_digests import tokenizer_digest

    began = time.monotonic()
    read = read_all(config, tokenizer, terminal)
    for source, report in zip(sources_of(config), read.reports, strict=True):
        report.check(source.config, "skip")
    findings, looked_at = examine(config, read, store_folder(config.data, tokenizer, tokenizer_digest(folder)))
    bad = {reason: {"count": n, "examples": [text for report in read.reports
                                             for text in report.bad.examples.get(reason, [])][:3]}
           for reason, n in _added([report.bad.counts for report in read.reports]).items()}
    return {"rows": sum(report.rows for report in read.reports), "pairs": sum(report.pairs for report in read.reports),
            "seconds": round(time.monotonic() - began, 3), "looked_at": looked_at,
            "no_pair": _added([report.no_pair for report in read.reports]), "bad_rows": bad,
            "findings": [entry.as_json() for entry in findings]}


def inputs_digest(config: RunConfig, tokenizer: Any | None, folder: Path) -> str:
    """sha256 of all that decides what an audit finds: the files' content, the tokenizer, the template and the keys."""
    from dpo_dist.audit.reading import sources_of
    from dpo_dist.data.locate import content_digest
    from dpo_dist.data.prepare import digests_folder
    from dpo_dist.data.templates import template_texts
    from dpo_dist.models.file_digests import tokenizer_digest

    memory = digests_folder(config.data)
    whole = {"version": VERSION, "data": deciding(config.data, TOKENS),
             "against": to_dict(config.audit)["against"], "tokenizer": tokenizer_digest(folder),
             "contents": [content_digest(source.config, memory) for source in sources_of(config)],
             "templates": template_texts(tokenizer, config.data.chat_template)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _earlier(file: Path, inputs: str) -> dict[str, Any] | None:
    """What an audit of the same inputs has written."""
    found = found_sealed(file)
    return found if found is not None and found.get("inputs") == inputs else None


def _added(counts: list[dict[str, int]]) -> dict[str, int]:
    return {reason: sum(each.get(reason, 0) for each in counts) for reason in dict.fromkeys(
        reason for each in counts for reason in each)}


# --------------------------------------------------------------------------------------------------------- for a person


def show(found: dict[str, Any], terminal: Terminal) -> None:
    rows = [[entry["severity"], entry["kind"], entry["count"], f"{entry['share']:.1%}",
             Path(next(iter(entry["examples"]), "")).name, entry["remedy"]] for entry in found["findings"]]
    if rows:
        terminal.table("audit", ["", "finding", "pairs", "share", "for example", "remedy"], rows)
    for reason, bad in found["bad_rows"].items():
        terminal.say(f"audit: bad rows: {reason}: {bad['count']:,}, as {bad['examples'][0]}")


def _summary(found: dict[str, Any]) -> str:
    counts = {severity: sum(entry["severity"] == severity for entry in found["findings"])
              for severity in reversed(SEVERITIES)}
    return ", ".join(f"{n} {name}{'s' * (n != 1 and name != 'info')}" for name, n in counts.items())


def _stop(config: RunConfig, found: dict[str, Any], file: Path) -> None:
    grave = [entry for entry in found["findings"] if reaches(entry["severity"], config.audit.fail_on)]
    if not grave:
        return
    told = "".join(f"\n  {entry['kind']} ({entry['severity']}): {entry['count']:,} pairs, as "
                   f"{', '.join(entry['examples'][:EXAMPLES_SHOWN])}; "
                   f"{entry.get('details', {}).get('why') or entry['remedy']}" for entry in grave)
    raise UserError(f"audit.fail_on={config.audit.fail_on}: the data have {len(grave)} finding(s) of this "
                    f"severity:{told}\nall of it is in {file}; mend the data, or set audit.fail_on=none to go on "
                    "nevertheless")


if __name__ == "__main__":
    exit_with(run_alone(sys.argv[1:], audit))
