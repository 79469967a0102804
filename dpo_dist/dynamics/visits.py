"""Visits on disk: `<run.dir>/visits/`, a parquet part for each rank and stretch of steps; 16 bytes a visit or fewer.

They are for who looks at a run under way, and for its end. A checkpoint holds all visits up to its step, so a run that
goes on from one removes what is here and writes those, and no visit is there twice or missing.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.runtime.tables import read_columns, write_columns

log = logging.getLogger(__name__)

COLUMNS = {"step": np.int32, "pair": np.int32, "reward_chosen": np.float32, "reward_rejected": np.float32}
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
    def joined(parts: Sequence[Visits]) -> Visits:
        """Those of the parts, one or more, one after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Visits(*map(np.concatenate, columns))

    @staticmethod
    def of(columns: Sequence[tuple[NDArray[Any], ...]]) -> Visits:
        """(step, pair, chosen, rejected) of several parts as one, in order."""
        if not columns:
            return Visits(*(np.empty(0, np.int32),) * 2, *(np.empty(0, np.float32),) * 2)
        step, pair, chosen, rejected = (np.concatenate(values) for values in zip(*columns, strict=True))
        # copies of a pair in one step come in an order of their own, whichever rank had which
        order = np.lexsort((rejected, chosen, pair, step))
        return Visits(step[order], pair[order], chosen[order], rejected[order])


def write_part(folder: Path, first: int, last: int, rank: int, visits: Visits) -> None:
    """Writes what this rank saw in steps `first` to `last`."""
    columns = zip(COLUMNS, (visits.step, visits.pair, visits.chosen, visits.rejected), strict=True)
    write_columns(folder / f"steps-{first:06d}-{last:06d}-rank-{rank}.parquet", dict(columns), use_dictionary=["step"],
                  column_encoding={"pair": "DELTA_BINARY_PACKED"}, compression="zstd", write_statistics=False,
                  store_schema=False)


def read_visits(folder: Path, say: Callable[[str], None] = log.warning) -> Visits:
    """All visits that are on disk; none where there is no part, or no folder. Those of a damaged part are missing,
    which `say` tells."""
    parts = [read_columns(path, COLUMNS, say) for _, _, path in _parts(folder)]
    return Visits.of([tuple(part[name] for name in COLUMNS) for part in parts if part is not None])


def remove_parts(folder: Path) -> None:
    """Removes all visits, and what a killed writer left."""
    for pattern in ("steps-*.parquet", ".steps-*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(first step, last step, file) of each part, in order of steps and ranks."""
    found = [(match, path) for path in folder.glob("steps-*.parquet") if (match := PART.fullmatch(path.name))]
    return [(int(m[1]), int(m[2]), path) for m, path in sorted(found, key=lambda f: tuple(map(int, f[0].groups())))]
