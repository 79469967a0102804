"""The writing side of a PairStore: pairs are appended, and never held in memory all at once."""
from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.runtime.files import sync_file, write_json
from dpo_dist.types import TokenizedPair

ARRAYS: dict[str, tuple[str, int]] = {       # name: (dtype, columns); 0 columns = one-dimensional
    "ids": ("<i4", 0),                       # (T,) prompt, chosen, rejected of pair 0, then of pair 1, ...
    "spans": ("<i8", 4),                     # (n, 4) offsets into ids: prompt, chosen, rejected, end
    "weight": ("<f4", 0),                    # (n,) the row's own weight in the loss
    "strength": ("<f4", 0),                  # (n,) NaN = unknown
    "source": ("<u2", 0),                    # (n,) index into meta's sources
    "content": ("<u8", 3),                   # (n, 3) hash of prompt, chosen and rejected: equal tokens, equal number
    # (n, 2) index into meta's places, and the line or row number there (-1 = none)
    "where": ("<i8", 2),
}
# what training sees: not where a row came from
IN_DIGEST = ("ids", "spans", "weight", "strength", "source")
FLUSH_PAIRS = 4096
NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class Source:
    """A data set of the configuration."""

    name: str
    path: str
    format: str
    weight: float = 1.0                      # data.train[].weight: how often its pairs are drawn


class PairWriter:
    """Appends pairs to a new store. Holds a few thousand, and 16 bytes for each earlier one to find repeats."""

    def __init__(self, path: Path, sources: Sequence[Source]):
        path.mkdir(parents=True)
        self.path, self.sources = path, tuple(sources)
        self.files = {name: _NpyFile(path / f"{name}.npy", *spec) for name, spec in ARRAYS.items()}
        self.places: dict[str, int] = {}
        self.prompt_hashes, self.pair_hashes = array("Q"), array("Q")
        self.pairs = self.tokens = 0
        self.largest_id = -1
        self.waiting: dict[str, list[Any]] = {name: [] for name in ARRAYS}

    def add(self, pair: TokenizedPair, source: int, prompt_hash: int) -> None:
        parts = [np.array(part, dtype="<i4") for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        ids, content = np.concatenate(parts), tuple(hash64(part.tobytes()) for part in parts)
        chosen = self.tokens + len(pair.prompt_ids)
        rejected = chosen + len(pair.chosen_ids)
        span = (self.tokens, chosen, rejected, self.tokens + len(ids))
        strength = float("nan") if pair.strength is None else pair.strength
        for name, value in zip(ARRAYS, (ids, span, pair.weight, strength, source, content, self._place(pair.where)),
                               strict=True):
            self.waiting[name].append(value)
        self.prompt_hashes.append(prompt_hash)
        self.pair_hashes.append(hash64(ids.tobytes() + np.diff(span).tobytes()))
        self.pairs, self.tokens = self.pairs + 1, span[3]
        self.largest_id = max(self.largest_id, int(ids.max(initial=-1)))
        if len(self.waiting["spans"]) >= FLUSH_PAIRS:
            self.flush()

    def _place(self, where: str) -> tuple[int, int]:
        """("rows.jsonl:12") → (index of "rows.jsonl:", 12)."""
        match = re.fullmatch(r"(.*?)(0|[1-9]\d{0,17})", where, re.DOTALL)
        place, number = (match[1], int(match[2])) if match else (where, -1)
        return self.places.setdefault(place, len(self.places)), number

    def flush(self) -> None:
        if self.waiting["spans"]:
            for name, values in self.waiting.items():
                self.files[name].append(np.concatenate(values) if name == "ids" else np.array(values))
                values.clear()

    def close(self, report: dict[str, Any]) -> None:
        """Completes the files. `report` is stored as it is, with the repetitions among the pairs added."""
        self.flush()
        digests = {name: file.close() for name, file in self.files.items()}
        digest = hashlib.sha256("".join(f"{name}:{digests[name]};" for name in IN_DIGEST).encode()).hexdigest()
        repeats = {"duplicate_pairs": self.pairs - len(np.unique(np.array(self.pair_hashes))),
                   "duplicate_prompts": self.pairs - len(np.unique(np.array(self.prompt_hashes)))}
        meta = {"pairs": self.pairs, "tokens": self.tokens, "largest_id": self.largest_id, "digest": digest,
                "sources": [vars(source) for source in self.sources], "places": list(self.places),
                "report": {**report, **repeats}}
        write_json(self.path / "meta.json", meta)


def hash64(content: bytes) -> int:
    """64 bits that depend on the content alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _NpyFile:
    """A .npy file that grows: its header, of fixed size, is written last, when the number of rows is known."""

    def __init__(self, path: Path, dtype: str, columns: int):
        self.stream, self.dtype, self.columns = path.open("wb"), dtype, columns
        self.stream.write(b"\0" * NPY_HEADER_BYTES)
        self.hash = hashlib.sha256()
        self.items = 0

    def append(self, values: NDArray[Any]) -> None:
        content = values.astype(self.dtype).tobytes()
        self.hash.update(content)
        self.stream.write(content)
        self.items += values.size

    def close(self) -> str:
        """The sha256 of the content."""
        shape = (self.items // self.columns, self.columns) if self.columns else (self.items,)
        self.stream.seek(0)
        np.lib.format.write_array_header_1_0(
            self.stream, {"descr": self.dtype, "fortran_order": False, "shape": shape})
        assert self.stream.tell() == NPY_HEADER_BYTES, "numpy pads every header to this size"
        sync_file(self.stream)
        self.stream.close()
        return self.hash.hexdigest()
