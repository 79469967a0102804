"""Files of one JSON object a line, which grow while a run goes on: a line that is not whole is left out. No torch."""
from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Row = dict[str, Any]
Fields = Mapping[str, tuple[type, ...]]        # what a row must have: {name: the kinds that its value may be of}
STEP: Fields = {"step": (int,)}


def json_lines(path: Path, fields: Fields | None = None) -> list[Row]:
    """The rows of the file, in order; none where there is no file. A line that a kill cut, or that something damaged,
    is left out, with a warning in the log."""
    return whole_and_broken(path, fields)[0]


def whole_and_broken(path: Path, fields: Fields | None = None) -> tuple[list[Row], int]:
    """(the rows of the file, how many further lines are none)."""
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return [], 0
    rows = [row for line in lines if (row := row_of(line, fields)) is not None]
    if broken := len(lines) - len(rows):
        log.warning("%s: %d of %d lines are not whole and are left out", path, broken, len(lines))
    return rows, broken


def row_of(line: bytes, fields: Fields | None = None) -> Row | None:
    """The object that a line holds, with these fields; None where it is not whole."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(row, dict) and all(type(row.get(name)) in kinds for name, kinds in (fields or {}).items())
    return row if fits else None
