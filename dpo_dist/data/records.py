"""The nouns of reading: a Record as it stands in a file, a BadRow that is none; and what counts as the same record."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.errors import printable


@dataclass(frozen=True)
class Record:
    where: str                               # "file:12" (line) or "file:row 12" (both from 1)
    value: Any                               # the row as written: a dict, unless the file is wrong
    rows: int = 1                            # of the file's rows, so many; 2 where a pair was made of two
    other: str | None = None                 # where the second of them stands


@dataclass(frozen=True)
class BadRow:
    where: str
    reason: str                              # one of a few fixed texts: bad rows are counted by it
    detail: str = ""

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else ""))


def json_ready(value: Any) -> Any:
    """The value with what JSON has no word for (dates, bytes, NaN) as text, and with text that every file takes."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def canonical(value: Any) -> bytes:
    """One way to write a record: the same bytes from every kind of file, whatever the order of its fields, whether an
    absent field is left out or null, and 5 or 5.0, since a table knows one kind of number a column."""
    return json.dumps(plain(value), sort_keys=True, default=str).encode()


def plain(value: Any) -> Any:
    """The value without what differs from one kind of file to another: nulls in objects, and 5.0 for 5."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
