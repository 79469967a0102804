"""Writes the tables of audits.md, by `dpo-dist audit`: python docs/audits.py DATA_FOLDER MODEL_FOLDER.

DATA_FOLDER holds the two sets, MODEL_FOLDER a tokenizer with its chat template. Of the sets' rows nothing is written
but their places.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETS = ("hh_harmless_test.jsonl.gz", "dpo_en_demo.json")
COLUMNS = ("severity", "kind", "count", "share", "what it says", "where, for example")
EXAMPLES = 3
ORDER = ("error", "warning", "info")


def audited(data: Path, model: Path, scratch: Path) -> dict[str, Any]:
    """audit.json of a set as it is."""
    run = scratch / data.name
    subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "audit", f"data.train={data}", f"model.path={model}",
                    f"run.dir={run}", f"data.cache_dir={scratch / 'tokens'}", "data.on_bad_row=skip",
                    "audit.fail_on=none", "cluster.device=cpu"], check=True, cwd=HERE.parent)
    return json.loads((run / "audit.json").read_text())


def table(audit: dict[str, Any], folder: Path) -> str:
    """The findings, the gravest first."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for finding in sorted(audit["findings"], key=lambda found: ORDER.index(found["severity"])):
        where = "; ".join(map(str, finding["examples"][:EXAMPLES])).replace(f"{folder}/", "")
        lines.append(f"| {finding['severity']} | `{finding['kind']}` | {finding['count']:,} | {finding['share']:.1%} | "
                     f"{one_line(finding['meaning'])} | {one_line(where)} |")
    return "\n".join(lines)


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def filled(text: str, data: Path, model: Path) -> str:
    """The document with its tables as they are found now."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in SETS:
            audit = audited(data / name, model, Path(scratch))
            before, rest = text.split(f"<!-- {name} -->\n")
            head = f"{audit['rows']:,} rows, {audit['pairs']:,} pairs."
            after = rest.split("<!-- end -->", 1)[1]
            text = f"{before}<!-- {name} -->\n{head}\n\n{table(audit, data)}\n<!-- end -->{after}"
    return text


if __name__ == "__main__":
    document = HERE / "audits.md"
    document.write_text(filled(document.read_text(), *(Path(word).resolve() for word in sys.argv[1:])))
