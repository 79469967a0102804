"""What became of a list of rows, told from their digests: edited, removed, added, or the same in another order."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.digests import Digests, RowDigests

MOST_MATCHED = 2000                          # of the rows that are gone, so many are looked for among the new ones

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Edit:
    """A row that is there before and after, with another content."""

    before: int                              # its place, from 0
    now: int
    fields: tuple[str, ...]                  # whose content is another; empty where the digests do not say


@dataclass(frozen=True)
class RowChanges:
    edited: tuple[Edit, ...]
    removed: tuple[int, ...]                 # places before, from 0
    added: tuple[int, ...]                   # places now
    reordered: bool                          # whether the rows that stayed follow one another in another order

    @property
    def same_rows(self) -> bool:
        return not (self.edited or self.removed or self.added)


def gone_and_new(before: Digests, now: Digests) -> tuple[Places, Places, bool]:
    """(places before of what is no longer there, places now of what was not there, whether the rest has another order).
    A digest that is there twice counts twice."""
    keys, new_keys = _numbered(before), _numbered(now)
    stays, is_old = np.isin(keys, new_keys), np.isin(new_keys, keys)
    reordered = not np.array_equal(keys[stays], new_keys[is_old])
    return np.flatnonzero(~stays), np.flatnonzero(~is_old), reordered


def row_changes(before: RowDigests, now: RowDigests) -> RowChanges:
    """What makes the rows of `now` of those of `before`. A row that is gone and a new one in its place, or one that has
    half of its fields, are one row that was edited."""
    gone, new, reordered = gone_and_new(before.rows, now.rows)
    left = set(new.tolist())
    old_fields, new_fields, names = _aligned(before, now)
    edited = []
    for place in gone[:MOST_MATCHED].tolist():
        at = _match(place, sorted(left), old_fields, new_fields, len(gone) == len(new))
        if at is not None:
            left.remove(at)
            differs = old_fields[place] != new_fields[at]
            edited.append(Edit(place, at, tuple(name for name, other in zip(names, differs, strict=True) if other)))
    matched = {edit.before for edit in edited}
    return RowChanges(tuple(edited), tuple(place for place in gone.tolist() if place not in matched),
                      tuple(sorted(left)), reordered)


def _match(place: int, candidates: Sequence[int], before: NDArray[np.uint16], now: NDArray[np.uint16],
           as_many: bool) -> int | None:
    """The new row that the old one has become, or None."""
    if not candidates:
        return None
    if as_many and place in candidates:
        return place
    own = before[place]
    shared = ((now[list(candidates)] == own) & (own != 0)).sum(1)
    best = int(shared.argmax())
    return candidates[best] if shared[best] and 2 * shared[best] >= np.count_nonzero(own) else None


def _aligned(before: RowDigests, now: RowDigests) -> tuple[NDArray[np.uint16], NDArray[np.uint16], list[str]]:
    """(fields before, fields now, their names), the same columns in both."""
    names = [*before.names, *(name for name in now.names if name not in before.names)]
    out = []
    for digests in (before, now):
        empty = np.zeros(len(digests), np.uint16)
        columns = [digests.fields[:, digests.names.index(name)] if name in digests.names else empty for name in names]
        out.append(np.stack(columns, 1) if columns else np.empty((len(digests), 0), np.uint16))
    return out[0], out[1], names


def _numbered(digests: Digests) -> Digests:
    """Each digest mixed with how many equal ones stand before it, so that no two are equal."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, np.int64)
    within = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    numbers = np.empty(len(digests), np.uint64)
    numbers[order] = within.astype(np.uint64)
    return digests ^ (numbers * np.uint64(0x9E3779B97F4A7C15))
