"""Free columns: what a row has beside all that its format and judgment.py read, kept in record["columns"].

What is kept must stay small, as it lies beside every pair: numbers, true and false, and texts of at most 100 characters
(dates count as texts), of at most 32 columns a row, as they come in the file. An object gives its own entries, by names
such as metadata.subset, one level deep. Anything else (longer texts, lists, nulls) stays in the file alone.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from dpo_dist.config.errors import printable
from dpo_dist.data.fields import Fields
from dpo_dist.data.formats.judgment import RECORDED, RESERVED, known, recorded
from dpo_dist.data.records import json_ready

LONGEST_TEXT, MOST_COLUMNS = 100, 32
# what is said itself, whichever format a row is of: in rows of another one it is there once more
TEXTS = {"prompt", "chosen", "rejected", "instruction", "question", "query", "input", "output", "response",
         "completion"}
# what else files call an answer's model, version and rating, in columns of that answer alone
OF_ANSWER = {"generator": "model", "generation_model": "model", "model_name": "model", "policy": "model",
             "model_version": "version", "revision": "version", "model_revision": "version", "score": "rating",
             "reward": "rating", "overall_score": "rating"}


def free_columns(fields: Fields, reads: str) -> dict[str, Any]:
    """{name: value} of a row's free columns. reads: a regular expression of the names that its format reads."""
    rest = {key: value for key, value in fields.items() if not _is_read(key, reads)}
    if any(key in RECORDED for key in rest):
        _, taken = recorded(fields)
        rest = {key: value for key, value in rest.items() if key not in taken}
    return small(rest)


@lru_cache(1024)
def _is_read(key: str, reads: str) -> bool:
    return key in RESERVED or key in TEXTS or bool(re.fullmatch(reads, key))


def small(fields: Fields) -> dict[str, Any]:
    """The fields that are small enough to keep."""
    kept: dict[str, Any] = {}
    for name, value in _flat(fields):
        ready = json_ready(value)
        if len(kept) < MOST_COLUMNS and len(name) <= LONGEST_TEXT and (
                not isinstance(ready, str) or 0 < len(ready) <= LONGEST_TEXT):
            kept[printable(name)] = ready
    return kept


def _flat(fields: Fields) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, str) and value[:1] in ("{", "["):           # an object or a list that stands as text
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        within = ((f"{key}.{name}", entry) for name, entry in value.items()) if isinstance(value, dict) else (
            (key, value),)
        for name, entry in within:
            if entry is not None and not isinstance(entry, dict | list | tuple | bytes):
                yield name, entry


def of_answer(side: str, about: Fields) -> dict[str, Any]:
    """What belongs to one answer → entries of the record, for side chosen or rejected: its model, version and rating by
    the names of RECORDED, all else in `columns` as chosen_<name> or rejected_<name>."""
    named: dict[str, Any] = {}
    for key, value in about.items():
        named.setdefault(f"{side}_{OF_ANSWER.get(key, key)}", value)
    found, taken = recorded({key: value for key, value in named.items() if RECORDED.get(key, ("",))[0] == key})
    columns = small({key: value for key, value in named.items() if key not in taken})
    return found | known({"columns": columns or None})


def beside_answer(fields: Fields, key: str) -> Fields:
    """The columns of one answer among several: of response_1 those named response_1_model, response_1.model, and
    model_1."""
    own = re.compile(re.escape(key) + r"[_.-](.+)")
    found = {match[1]: value for name, value in fields.items() if (match := own.fullmatch(name))}
    if mark := re.search(r"[_-]?(\d+|[a-d])$", key):
        for noun in ("model", "version", "generator"):
            for name in (f"{noun}_{mark[1]}", f"{noun}-{mark[1]}", f"{noun}{mark[1]}"):
                if name in fields and name != key:
                    found.setdefault(noun, fields[name])
    return found


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Records as one: later ones take precedence, and their columns stand together."""
    columns = {name: value for part in parts for name, value in part.get("columns", {}).items()}
    return {name: value for part in parts for name, value in part.items()} | known({"columns": columns or None})
