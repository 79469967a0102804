"""What the tests of reading share: small files of rows, and what comes out of them."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.formats import DataRow
from dpo_dist.data.rows import ReadReport, read_rows
from dpo_dist.types import PreferenceRow

PLAIN = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}


def user(text: object) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def calls(name: str, arguments: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, format: str = "auto", on_bad_row: str = "error", **more: Any) -> tuple[list[DataRow], ReadReport]:
    rows, report = read_rows(DatasetConfig(str(path), format, **more), on_bad_row)
    return list(rows), report


def read_one(tmp_path: Path, row: dict, format: str = "auto") -> PreferenceRow:
    (only,), _ = read(write_lines(tmp_path / "rows.jsonl", row), format)
    assert isinstance(only, PreferenceRow)
    return only


def reasons(tmp_path: Path, format: str, *rows: object) -> dict[str, int]:
    return read(write_lines(tmp_path / "bad.jsonl", *rows), format, "skip")[1].bad.counts
