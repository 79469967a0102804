"""A row's fields → sound Python values, or Unfit with the reason: text, numbers, JSON, token ids."""
from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from dpo_dist.types import Message

Fields = dict[str, Any]
Turns = tuple[Message, ...]
LARGEST = 1e38                               # of a number, so that differences of two are finite in fp32 as well
IDENTICAL = "chosen and rejected are identical"


class Unfit(ValueError):
    """A record that is not what its format asks for."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def reserved(name: str, found: str) -> str:
    """What else is said of a field whose name means something, but which holds something else: how to map it away."""
    return f"{found}; {name} is a reserved name: a column of your own is left out with columns: {{{name}: null}}"


def need(fields: Fields, *keys: str) -> None:
    """Unfit for the first of these keys that is missing."""
    for key in keys:
        if key not in fields:
            raise Unfit(f"{key} is missing", f"fields: {', '.join(fields)}")


def first_of(fields: Fields, *keys: str) -> str:
    """The first of these keys that the row has; Unfit for the first of them where it has none."""
    found = next((key for key in keys if key in fields), None)
    if found is None:
        need(fields, keys[0])
    return found or ""


def text_of(fields: Fields, key: str) -> str:
    need(fields, key)
    return sound_text(fields[key], key)


def sound_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{key} is not text", type(value).__name__)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, "\\ud83d": no tokenizer takes it
            raise Unfit(f"{key} is not valid Unicode", f"character {error.start + 1}") from None
    return value


def number(value: Any, key: str) -> float:
    found = number_or_none(value)
    if found is None:
        raise Unfit(f"{key} is not a number", repr(value)[:40])
    return found


def number_or_none(value: Any) -> float | None:
    """A finite number, given as such or as text, as in the cells of a CSV; None for anything else, and for one that is
    too large to be kept (in fp32)."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        value = float(value)
    except OverflowError:                    # a whole number of hundreds of digits
        return None
    return value if abs(value) <= LARGEST else None


def yes_or_no(value: Any) -> bool | None:
    """True or False, given as such, as 1 and 0, or as text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def n_shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many entries at the beginning of both are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def from_json(value: Any, key: str, kind: type) -> Any:
    """A list or object, given as such or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"{key} is not JSON", getattr(error, "msg", str(error))) from None
    if not isinstance(value, kind):
        raise Unfit(f"{key} is not {'a list' if kind is list else 'an object'}", type(value).__name__)
    return value


def counts_of(fields: Fields, key: str, ids: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Which of the ids the loss counts, from a list of 0 and 1; None where the field is missing: all of them."""
    counts = fields.get(key)
    if counts is None:
        return None
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int, bool} or not set(counts) <= {0, 1}:
        raise Unfit(f"{key} is not a list of 0 and 1", repr(counts)[:40])
    if len(counts) != len(ids):
        raise Unfit(f"{key} has another length than its ids", f"{len(counts)}, not {len(ids)}")
    return tuple(map(bool, counts))


def ids_of(fields: Fields, key: str) -> tuple[int, ...]:
    ids = fields.get(key)
    if not isinstance(ids, list):
        raise Unfit(f"{key} is missing or not a list", f"fields: {', '.join(fields)}")
    if not set(map(type, ids)) <= {int}:     # exactly int: true and 1.0 are no token ids
        raise Unfit(f"{key} has an entry that is not a whole number",
                    repr(next(i for i in ids if type(i) is not int))[:40])
    if ids and not (min(ids) >= 0 and max(ids) < 2**31):
        raise Unfit(f"{key} has an id out of range", f"from {min(ids)} to {max(ids)}")
    return tuple(ids)
