"""Facts: what the data know of held-out pairs besides tokens: prompts, ties, and values by which they are sliced."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.store import PairStore
from dpo_dist.stats.intervals import cluster_numbers

# {a name in the record: what the slices are called}; columns of the data's own keep their names
KEYS = {"locale": "language", **{name: name for name in (
    "annotator_class", "annotator", "confidence", "chosen_model", "rejected_model")}}
MOST_KINDS = 8                               # different numbers that are slices each; more are cut into quarters
LONGEST_NAME = 60                            # characters of a value's name; longer texts are no slices
Members = dict[tuple[str, str], NDArray[np.int64]]


@dataclass(frozen=True)
class Facts:
    """Of n held-out pairs, in the order of the store."""

    prompt: NDArray[np.int64]                # (n,) a number for each prompt: pairs of one prompt are not independent
    tie: NDArray[np.bool_]                   # (n,) the data say that neither answer is better
    members: Members = field(default_factory=dict)       # {(by, value): the indexes of the pairs that have it}

    @staticmethod
    def of(pairs: PairStore) -> Facts:
        """Reads all records. Text columns with nearly as many values as pairs name the rows, and are no slices."""
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        numbers: dict[str, list[tuple[int, float]]] = defaultdict(list)
        sources = [str(source["name"]) for source in pairs.meta["sources"]]
        for i, record in enumerate(pairs.all_records()):
            found["source", sources[pairs.source[i]]].append(i)
            for by, value in values_of(record):
                if isinstance(value, float):
                    numbers[by].append((i, value))
                else:
                    found[by, value].append(i)
        values, pairs_of = Counter[str](), Counter[str]()
        for (by, _), at in found.items():
            values[by] += 1
            pairs_of[by] += len(at)
        members = {key: np.array(at) for key, at in found.items() if 2 * values[key[0]] <= pairs_of[key[0]] + 1}
        for by, known in numbers.items():
            members |= of_numbers(by, *zip(*known, strict=True))
        members |= of_numbers("strength", np.flatnonzero(~np.isnan(pairs.strength)),
                              pairs.strength[~np.isnan(pairs.strength)].astype(np.float64))
        members |= of_lengths(pairs.counted().max(1))
        return Facts(cluster_numbers(pairs.content[:, 0]), pairs.tie > 0, members)

    def subsets(self) -> dict[str, NDArray[np.int64]]:
        """{value of the data's own column `subset`: its pairs}."""
        return {value: at for (by, value), at in self.members.items() if by == "subset"}


def values_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str | float]]:
    """(by, value) of everything in a pair's record that can be a slice: names as text, numbers as floats."""
    for key, by in KEYS.items():
        if key in record:
            yield from _plain(by, record[key])
    tags = record.get("tags")
    if isinstance(tags, Mapping):
        for name, value in tags.items():
            yield from _plain(f"tag {name}", value)
    else:
        for tag in dict.fromkeys(str(tag) for tag in tags) if isinstance(tags, list) else [tags]:
            yield from _plain("tag", tag)
    columns = record.get("columns")
    for name, value in columns.items() if isinstance(columns, Mapping) else ():
        yield from _plain(str(name), value)


def _plain(by: str, value: Any) -> Iterator[tuple[str, str | float]]:
    if isinstance(value, bool):
        yield by, str(value).lower()
    elif isinstance(value, int | float):
        yield by, float(value)
    elif isinstance(value, str) and 0 < len(value.strip()) <= LONGEST_NAME:
        yield by, value.strip()


def of_numbers(by: str, pairs: Sequence[int] | NDArray[np.int64],
               values: Sequence[float] | NDArray[np.float64]) -> Members:
    """Slices of pairs with these numbers: one for each number where there are few, else quarters."""
    at, x = np.asarray(pairs, dtype=np.int64), np.asarray(values, dtype=np.float64)
    kinds = np.unique(x)
    if len(kinds) <= MOST_KINDS:
        return {(by, f"{kind:g}"): at[x == kind] for kind in kinds}
    which = np.searchsorted(np.unique(np.quantile(x, [0.25, 0.5, 0.75])), x, "left")
    return {(by, f"{x[which == part].min():g} to {x[which == part].max():g}"): at[which == part]
            for part in np.unique(which)}


def of_lengths(tokens: NDArray[np.int32]) -> Members:
    """Slices by the tokens of the longer completion, each twice as wide as the one before: the same for every set."""
    power = np.maximum(np.ceil(np.log2(np.maximum(tokens, 1))).astype(int), 5)
    return {("length", f"{2 ** (p - 1) + 1 if p > 5 else 1} to {2 ** p} tokens"): np.flatnonzero(power == p)
            for p in np.unique(power)}
