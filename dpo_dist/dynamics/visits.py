"""Visits on disk: `<run.dir>/visits/`, a parquet part for each rank and stretch of steps; 16 bytes a visit or fewer.

A part never reaches over a checkpoint, so a run that goes on from one removes whole parts, and no visit is there twice.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_dist.runtime.files import replacing

PART = re.compile(r"steps-(\d+)-(\d+)-rank-(\d+)\.parquet")


@dataclass(frozen=True)
class Visits:
    """Every time that a step saw a pair: n visits, ordered by step, then pair."""

    step: NDArray[np.int32]                  # (n,) from 1
    pair: NDArray[np.int32]                  # (n,) index in the training store
    chosen: NDArray[np.float32]              # (n,) reward of the chosen completion before that step's update
    rejected: NDArray[np.float32]            # (n,)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def margin(self) -> NDArray[np.float64]:
        """(n,) reward of chosen minus that of rejected."""
        return self.chosen.astype(np.float64) - self.rejected

    def of_pairs(self, wanted: NDArray[np.bool_]) -> Visits:
        """Those of the pairs that are wanted: (pairs of the store,)."""
        these = wanted[self.pair]
        return Visits(self.step[these], self.pair[these], self.chosen[these], self.rejected[these])

    @staticmethod
    def of(columns: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]]
           ) -> Visits:
        """(step, pair, chosen, rejected) of several parts as one, in order."""
        if not columns:
            return Visits(*(np.empty(0, np.int32),) * 2, *(np.empty(0, np.float32),) * 2)
        step, pair, chosen, rejected = (np.concatenate(values) for values in zip(*columns, strict=True))
        # copies of a pair in one step come in an order of their own, whichever rank had which
        order = np.lexsort((rejected, chosen, pair, step))
        return Visits(step[order], pair[order], chosen[order], rejected[order])


def write_part(folder: Path, first: int, last: int, rank: int, visits: Visits) -> None:
    """Writes what this rank saw in steps `first` to `last`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"step": visits.step, "pair": visits.pair, "reward_chosen": visits.chosen,
                      "reward_rejected": visits.rejected})
    with replacing(folder / f"steps-{first:06d}-{last:06d}-rank-{rank}.parquet") as file:
        pq.write_table(table, file, use_dictionary=["step"], column_encoding={"pair": "DELTA_BINARY_PACKED"},
                       compression="zstd", write_statistics=False, store_schema=False)


def read_visits(folder: Path) -> Visits:
    """All visits that are on disk; none where there is no part, or no folder."""
    import pyarrow.parquet as pq

    columns = []
    for _, _, path in _parts(folder):
        table = pq.ParquetFile(path).read()
        step, pair, chosen, rejected = (column.to_numpy() for column in table.columns)
        columns.append((step, pair, chosen, rejected))
    return Visits.of(columns)


def keep_until(folder: Path, step: int) -> None:
    """Removes the visits after this step, and what a killed writer left. Of a run that begins anew: all, by step 0."""
    for _, last, path in _parts(folder):
        if last > step:
            path.unlink()
    for left in folder.glob(".steps-*.tmp"):
        left.unlink()


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(first step, last step, file) of each part, in order of steps and ranks."""
    found = [(match, path) for path in folder.glob("steps-*.parquet") if (match := PART.fullmatch(path.name))]
    return [(int(m[1]), int(m[2]), path) for m, path in sorted(found, key=lambda f: tuple(map(int, f[0].groups())))]
