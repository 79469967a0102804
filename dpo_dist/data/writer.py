"""The writing side of a PairStore: pairs are appended, and never held in memory all at once."""
from __future__ import annotations

import hashlib
import json
import re
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.runtime.files import sync_file, write_json
from dpo_dist.types import TIE_KINDS, TokenizedPair

ARRAYS: dict[str, tuple[str, int]] = {       # name: (dtype, columns); 0 columns = one-dimensional
    "ids": ("<i4", 0),                       # (T,) prompt, chosen, rejected of pair 0, then of pair 1, ...
    "spans": ("<i8", 4),                     # (n, 4) offsets into ids: prompt, chosen, rejected, end
    # (k, 2) offsets into ids, ascending: the runs (start, end) of completion tokens that the loss does not count; none
    # where all count, and none reaches from one completion into another
    "uncounted": ("<i8", 2),
    "weight": ("<f4", 0),                    # (n,) the row's own weight in the loss
    "strength": ("<f4", 0),                  # (n,) NaN = unknown
    "tie": ("<u1", 0),                       # (n,) 0 = chosen is better, else the place in TIE_KINDS
    "source": ("<u2", 0),                    # (n,) index into meta's sources
    # (n, 3) hash of prompt, chosen and rejected: equal where the tokens, and which of them count, are equal
    "content": ("<u8", 3),
    # (n, 2) index into meta's places, and the line or row number there (-1 = none)
    "where": ("<i8", 2),
    "records": ("<u1", 0),                   # JSON texts, one after the other: what else is known of each judgment
    "record_end": ("<i8", 0),                # (n,) offset into records; a pair without a record has no byte there
}
# Arrays of which a pair has any number of rows; of the others it has one.
ANY_NUMBER = ("ids", "uncounted", "records")
# Arrays that hold offsets into another: laid end to end, the second part's go on where the first part's end.
OFFSETS = {"spans": "ids", "uncounted": "ids", "record_end": "records"}
# what training sees: not where a row came from, nor what else is known of it; `uncounted` and `tie` where they say
# anything
IN_DIGEST = ("ids", "spans", "weight", "strength", "source")
FLUSH_PAIRS = 4096
NPY_HEADER_BYTES = 128
NO_RUNS = np.empty((0, 2), dtype=np.int64)
# of a part: (n, 2) hash of prompt and pair, to find repeats; and what its "where" points to
HASHES, PLACES = "hashes.npy", "places.json"


@dataclass(frozen=True)
class Source:
    """A data set of the configuration."""

    name: str
    path: str
    format: str
    weight: float = 1.0                      # data.train[].weight: how often its pairs are drawn


class PairWriter:
    """Appends pairs to a new store, one by one or from another store. Holds a few thousand, and 16 bytes for each
    earlier one to find repeats."""

    def __init__(self, path: Path, sources: Sequence[Source]):
        path.mkdir(parents=True)
        self.path, self.sources = path, tuple(sources)
        self.files = {name: _NpyFile(path / f"{name}.npy", *spec) for name, spec in ARRAYS.items()}
        self.places: dict[str, int] = {}
        self.prompt_hashes, self.pair_hashes = array("Q"), array("Q")
        self.pairs = self.tokens = self.record_bytes = 0
        self.largest_id, self.ties = -1, 0
        self.waiting: dict[str, list[Any]] = {name: [] for name in ARRAYS}

    def add(self, pair: TokenizedPair, source: int, prompt_hash: int) -> None:
        parts = [np.array(part, dtype="<i4") for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        *starts, end = accumulate(map(len, parts), initial=self.tokens)
        runs = [_uncounted(counts) for counts in (None, pair.chosen_counts, pair.rejected_counts)]
        content = [hash64(part.tobytes() + (b"uncounted" + left_out.tobytes() if len(left_out) else b""))
                   for part, left_out in zip(parts, runs, strict=True)]
        # as text where JSON has no such kind of value: a table's column of tags may hold dates
        record = json.dumps(pair.record, default=str).encode() if pair.record else b""
        self.record_bytes += len(record)
        rows: dict[str, Any] = {                 # of the arrays in ANY_NUMBER: lists of rows
            "ids": parts, "spans": (*starts, end), "weight": pair.weight, "source": source, "content": content,
            "uncounted": [left_out + start for left_out, start in zip(runs, starts, strict=True) if len(left_out)],
            "strength": float("nan") if pair.strength is None else pair.strength, "where": self._place(pair.where),
            "tie": TIE_KINDS.index(pair.tie),
            "records": [np.frombuffer(record, "<u1")] if record else [], "record_end": self.record_bytes}
        for name, value in rows.items():
            if name in ANY_NUMBER:
                self.waiting[name] += value
            else:
                self.waiting[name].append(value)
        self.prompt_hashes.append(prompt_hash)
        self.pair_hashes.append(hash64(struct.pack("<3Q", *content)))
        self.pairs, self.tokens, self.ties = self.pairs + 1, end, self.ties + (pair.tie is not None)
        if len(self.waiting["spans"]) >= FLUSH_PAIRS:
            self.flush()

    def rows(self) -> dict[str, int]:
        """{array: the rows it has by now}, all of them in the files."""
        self.flush()
        return {name: file.rows for name, file in self.files.items()}

    def extend(self, part: Path, places: Sequence[str], first: Mapping[str, int], end: Mapping[str, int]) -> None:
        """Appends what the part in that folder has from rows `first` to rows `end` of its arrays, as `add` would have.
        places: those that `places_of` knows of it."""
        before = self.rows()
        for name, (dtype, columns) in ARRAYS.items():
            if first[name] == end[name]:
                continue
            rows = _rows_of(part / f"{name}.npy", dtype, columns, first[name], end[name])
            if name in OFFSETS:
                rows += before[OFFSETS[name]] - first[OFFSETS[name]]
            elif name == "where":
                used, at, inverse = np.unique(rows[:, 0], return_index=True, return_inverse=True)
                known = {int(used[i]): self._number_of(places[used[i]]) for i in np.argsort(at)}    # as they appear
                rows[:, 0] = np.array([known[int(place)] for place in used])[inverse]
            elif name == "ids":
                self.largest_id = max(self.largest_id, int(rows.max()))
            elif name == "tie":
                self.ties += int(np.count_nonzero(rows))
            self.files[name].append(rows)
        hashes = _rows_of(part / HASHES, "<u8", 2, first["spans"], end["spans"])
        self.prompt_hashes.frombytes(hashes[:, 0].tobytes())
        self.pair_hashes.frombytes(hashes[:, 1].tobytes())
        self.pairs += len(hashes)
        self.tokens, self.record_bytes = self.files["ids"].rows, self.files["records"].rows

    def close_part(self) -> None:
        """Completes the files of a store that is only there for another to be extended by."""
        self.flush()
        for file in self.files.values():
            file.close(sync=False)
        np.save(self.path / HASHES, np.stack([np.array(self.prompt_hashes), np.array(self.pair_hashes)], 1))
        (self.path / PLACES).write_text(json.dumps(list(self.places)))

    def _place(self, where: str) -> tuple[int, int]:
        """("rows.jsonl:12") → (index of "rows.jsonl:", 12)."""
        match = re.fullmatch(r"(.*?)(0|[1-9]\d{0,17})", where, re.DOTALL)
        place, number = (match[1], int(match[2])) if match else (where, -1)
        return self._number_of(place), number

    def _number_of(self, place: str) -> int:
        return self.places.setdefault(place, len(self.places))

    def flush(self) -> None:
        for name, values in self.waiting.items():
            if values:
                rows = np.concatenate(values) if name in ANY_NUMBER else np.array(values, dtype=ARRAYS[name][0])
                self.files[name].append(rows)
                if name == "ids":
                    self.largest_id = max(self.largest_id, int(rows.max(initial=-1)))
                values.clear()

    def close(self, report: dict[str, Any]) -> None:
        """Completes the files. `report` is stored as it is, with the repetitions among the pairs added."""
        self.flush()
        digests = {name: file.close() for name, file in self.files.items()}
        seen = [*IN_DIGEST, *["uncounted"] * bool(self.files["uncounted"].items), *["tie"] * bool(self.ties)]
        digest = hashlib.sha256("".join(f"{name}:{digests[name]};" for name in seen).encode()).hexdigest()
        repeats = {"duplicate_pairs": self.pairs - len(np.unique(np.array(self.pair_hashes))),
                   "duplicate_prompts": self.pairs - len(np.unique(np.array(self.prompt_hashes)))}
        meta = {"pairs": self.pairs, "tokens": self.tokens, "largest_id": self.largest_id, "digest": digest,
                "sources": [vars(source) for source in self.sources], "places": list(self.places),
                "report": {**report, **repeats}}
        write_json(self.path / "meta.json", meta)


def hash64(content: bytes) -> int:
    """64 bits that depend on the content alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _uncounted(counts: Sequence[bool] | None) -> NDArray[np.int64]:
    """(k, 2) the runs (start, end) of a completion's tokens that do not count."""
    if counts is None:
        return NO_RUNS
    changes = np.diff(np.array([True, *counts, True], dtype=np.int8))
    return np.stack([np.flatnonzero(changes < 0), np.flatnonzero(changes > 0)], 1)


def places_of(part: Path) -> list[str]:
    """What `where` of a closed part points to."""
    return list(json.loads((part / PLACES).read_text()))


def _rows_of(file: Path, dtype: str, columns: int, first: int, end: int) -> NDArray[Any]:
    """Rows `first` to `end` of an array in a .npy file, read into memory: a map would count as this process's."""
    width = max(1, columns)
    start = NPY_HEADER_BYTES + first * width * np.dtype(dtype).itemsize
    flat = np.fromfile(file, dtype, (end - first) * width, offset=start)
    return flat.reshape(-1, columns) if columns else flat


class _NpyFile:
    """A .npy file that grows: its header, of fixed size, is written last, when the number of rows is known."""

    def __init__(self, path: Path, dtype: str, columns: int):
        self.stream, self.dtype, self.columns = path.open("wb"), dtype, columns
        self.stream.write(b"\0" * NPY_HEADER_BYTES)
        self.hash = hashlib.sha256()
        self.items = 0

    @property
    def rows(self) -> int:
        return self.items // max(1, self.columns)

    def append(self, values: NDArray[Any]) -> None:
        content = values.astype(self.dtype).tobytes()
        self.hash.update(content)
        self.stream.write(content)
        self.items += values.size

    def close(self, sync: bool = True) -> str:
        """The sha256 of the content. sync: waits until it is on disk."""
        shape = (self.items // self.columns, self.columns) if self.columns else (self.items,)
        self.stream.seek(0)
        np.lib.format.write_array_header_1_0(
            self.stream, {"descr": self.dtype, "fortran_order": False, "shape": shape})
        assert self.stream.tell() == NPY_HEADER_BYTES, "numpy pads every header to this size"
        if sync:
            sync_file(self.stream)
        self.stream.close()
        return self.hash.hexdigest()
