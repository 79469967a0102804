"""PairStore: tokenized pairs on disk, memory-mapped. All ranks and runs share one copy, and large sets need no memory.

A folder of flat arrays (n pairs, T tokens in all) and meta.json, found in data.cache_dir by the content of all that it
was made from, or built there under a temporary name and renamed once complete.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.units import PairShapes
from dpo_dist.data.writer import ARRAYS
from dpo_dist.types import TIE_KINDS, TokenizedPair

P = TypeVar("P", bound="Pairs")
Parts = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class PairStore:
    path: Path
    meta: dict[str, Any]
    ids: NDArray[np.int32]
    spans: NDArray[np.int64]
    uncounted: NDArray[np.int64]
    weight: NDArray[np.float32]
    strength: NDArray[np.float32]
    tie: NDArray[np.uint8]
    source: NDArray[np.uint16]
    content: NDArray[np.uint64]
    where: NDArray[np.int64]
    records: NDArray[np.uint8]
    record_end: NDArray[np.int64]

    @staticmethod
    def open(path: str | Path) -> PairStore:
        """Mapped as it is: prepare.is_whole holds its files against their checksums first, and so the digest that
        meta.json tells of them."""
        path = Path(path)
        meta = json.loads((path / "meta.json").read_text())
        # Plain array views: slicing numpy's memmap class takes ten times as long.
        return PairStore(path, meta, **{name: np.load(path / f"{name}.npy", mmap_mode="r").view(np.ndarray)
                                        for name in ARRAYS})

    def __len__(self) -> int:
        return int(self.meta["pairs"])

    def __getitem__(self, index: int) -> TokenizedPair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        prompt, chosen, rejected = (tuple(part.tolist()) for part in self.parts(index))
        strength = float(self.strength[index])
        _, *starts, end = self.spans[index].tolist()
        return TokenizedPair(prompt, chosen, rejected, self.where_of(index), self.source_of(index),
                             None if np.isnan(strength) else strength, float(self.weight[index]),
                             self._counts(starts[0], starts[1]), self._counts(starts[1], end), self.record(index),
                             tie=TIE_KINDS[self.tie[index]])

    def where_of(self, index: int) -> str:
        """Where the pair's record stands: "file:line", for a person."""
        place, number = self.where[index].tolist()
        return str(self.meta["places"][place]) + (str(number) if number >= 0 else "")

    def source_of(self, index: int) -> str:
        """The name of the pair's data set."""
        return str(self.meta["sources"][self.source[index]]["name"])

    def _counts(self, start: int, end: int) -> tuple[bool, ...] | None:
        """Which tokens of the completion that lies there in `ids` the loss counts; None: all."""
        first, last = np.searchsorted(self.uncounted[:, 0], (start, end)).tolist() if len(self.uncounted) else (0, 0)
        if first == last:
            return None
        counts = np.ones(end - start, dtype=bool)
        for run_start, run_end in (self.uncounted[first:last] - start).tolist():
            counts[run_start:run_end] = False
        return tuple(counts.tolist())

    def record(self, index: int) -> dict[str, Any]:
        """What else is known of the pair's judgment (formats/judgment.py), read from the map."""
        start = self.record_end[index - 1] if index else 0
        text = self.records[start:self.record_end[index]].tobytes()
        return dict(json.loads(text)) if text else {}

    def all_records(self) -> Iterator[dict[str, Any]]:
        """`record` of every pair in turn, in one pass over the map."""
        start = 0
        for end in self.record_end.tolist():
            yield json.loads(self.records[start:end].tobytes()) if end > start else {}
            start = end

    def facts(self, name: str) -> list[Any]:
        """What is known of every pair under one name, None where nothing is: a name of its record or, with a dot, one
        within, as in "locale", "columns.subset" and "tags.domain"; or "source", "weight", "strength" and "tie" (None
        for no tie)."""
        return self.all_facts([name])[name]

    def all_facts(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """{name: `facts` of it}, read in one pass."""
        found = {name: self._of_arrays(name) for name in names}
        within = {name: (name, *name.split(".", 1)) for name, values in found.items() if values is None}
        if within:
            columns: dict[str, list[Any]] = {name: [] for name in within}
            for record in self.all_records():
                for name, (whole, *path) in within.items():
                    inner = record.get(path[0]) if len(path) > 1 else None
                    columns[name].append(inner.get(path[1]) if isinstance(inner, dict) else record.get(whole))
            found |= columns
        return {name: values or [] for name, values in found.items()}

    def fact_names(self) -> dict[str, int]:
        """{name: of how many pairs `facts` knows a number, a text, true or false under it}, in one pass."""
        counts: dict[str, int] = {}
        for record in self.all_records():
            for key, value in record.items():
                inner = {f"{key}.{name}": held for name, held in value.items()} if isinstance(value, dict) else {
                    key: value}
                for name, held in inner.items():
                    if isinstance(held, str | int | float):
                        counts[name] = counts.get(name, 0) + 1
        return counts

    def _of_arrays(self, name: str) -> list[Any] | None:
        """The facts that have an array of their own; None for another name."""
        if name == "source":
            sources = [source["name"] for source in self.meta["sources"]]
            return [sources[i] for i in self.source.tolist()]
        if name == "tie":
            return [TIE_KINDS[i] for i in self.tie.tolist()]
        if name == "weight":
            return list(self.weight.tolist())
        return [None if s != s else s for s in self.strength.tolist()] if name == "strength" else None

    def parts(self, index: int) -> Parts:
        """(prompt, chosen, rejected) token ids as views into the map: no copy."""
        a, b, c, d = self.spans[index].tolist()
        return self.ids[a:b], self.ids[b:c], self.ids[c:d]

    def lengths(self) -> NDArray[np.int32]:
        """(n, 3) int32: tokens of prompt, chosen and rejected."""
        return self._lengths

    @cached_property
    def _lengths(self) -> NDArray[np.int32]:
        return np.diff(self.spans, axis=1).astype(np.int32)

    def counted(self) -> NDArray[np.int32]:
        """(n, 2) int32: tokens of chosen and rejected that the loss counts."""
        return self._counted

    @cached_property
    def _counted(self) -> NDArray[np.int32]:
        lengths = self._lengths[:, 1:]
        if not len(self.uncounted):
            return lengths
        starts = self.spans[:, 1:3].ravel()                  # of all completions, ascending
        completion = np.searchsorted(starts, self.uncounted[:, 0], side="right") - 1
        left_out = np.bincount(completion, weights=np.diff(self.uncounted)[:, 0], minlength=len(starts))
        return lengths - left_out.astype(np.int32).reshape(-1, 2)

    def shapes(self, pair_ids: NDArray[np.int64]) -> PairShapes:
        """What the planner needs to know of these pairs."""
        return PairShapes(self._lengths[pair_ids], self.content[pair_ids])

    def largest_id(self) -> int:
        """The largest token id of all pairs; -1 where there are none."""
        return int(self.meta["largest_id"])

    @property
    def digest(self) -> str:
        """sha256 over tokens and which of them count, weights, strengths, ties and sources, in order."""
        return str(self.meta["digest"])

    @property
    def source_weights(self) -> tuple[float, ...]:
        """data.train[].weight of each source, by the index that `source` holds."""
        return tuple(source["weight"] for source in self.meta["sources"])

    @property
    def report(self) -> dict[str, Any]:
        """What was read, dropped, truncated and repeated on the way here; see summary.py."""
        return dict(self.meta["report"])


class Pairs(Protocol):
    """What scoring needs of tokenized pairs."""

    def __len__(self) -> int: ...

    def parts(self, index: int) -> Parts: ...

    def lengths(self) -> NDArray[np.int32]: ...


class PairStores(Generic[P]):
    """Several stores as one: pair i of them laid end to end."""

    def __init__(self, stores: Sequence[P]):
        self._stores = tuple(stores)
        self._first = np.cumsum([0, *map(len, stores)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def at(self, index: int) -> tuple[P, int]:
        """(the store that pair `index` lies in, its place there)."""
        store = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._stores[store], index - int(self._first[store])

    def parts(self, index: int) -> Parts:
        """(prompt, chosen, rejected) token ids as views into the maps."""
        store, place = self.at(index)
        return store.parts(place)

    def all_parts(self) -> Iterator[Parts]:
        """`parts` of every pair in turn, without a search for each."""
        return (store.parts(i) for store in self._stores for i in range(len(store)))

    def lengths(self) -> NDArray[np.int32]:
        """(n, 3) int32: tokens of prompt, chosen and rejected."""
        lengths = [store.lengths() for store in self._stores]
        return lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
