"""VisitLog: each rank keeps the rewards of its own pairs as it trains on them, and writes them now and then. No rank
asks another, and none waits for its device: a step's rewards are read once the next step is queued.

All of them stay in memory, 16 bytes a visit, as a checkpoint holds them: visits-RANK.safetensors."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from dpo_dist.config.schema import LossConfig
from dpo_dist.dynamics.visits import Visits, write_part
from dpo_dist.losses import rewards
from dpo_dist.runtime.later import Later
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.types import PairLogps


class VisitLog:
    """What this rank's pairs showed. `done`: steps of a checkpoint that is still to be loaded."""

    def __init__(self, folder: Path, loss: LossConfig, rank: int, ranks: int, done: int):
        self._folder, self._loss, self._rank, self._ranks, self._written = folder, loss, rank, ranks, done
        self._step: list[tuple[tuple[int, ...], Tensor]] = []        # of the step being computed: each pack's
        self._waiting: tuple[int, NDArray[np.int32], Later] | None = None    # of the last step: (2, B), on their way
        self._known: list[tuple[int, NDArray[np.int32], NDArray[np.float32]]] = []       # of steps not yet written
        self._parts: list[Visits] = []                               # all that is written
        # of the newest step that is read: pairs and their (2, B) rewards, also once they are written
        self.newest: tuple[NDArray[np.int32], NDArray[np.float32]] = np.empty(0, np.int32), np.empty((2, 0), np.float32)

    def files(self) -> dict[str, TensorFile]:
        """What a checkpoint holds of this rank: all that is written; no file where there is none."""
        if not self._parts:
            return {}
        self._parts = [Visits.joined(self._parts)]
        columns = {name: torch.from_numpy(values) for name, values in vars(self._parts[0]).items()}
        return {f"visits-{self._rank:05d}.safetensors": TensorFile(columns)}

    def load(self, folder: Path) -> None:
        """Takes a checkpoint's visits, of any number of ranks, and writes them as one part."""
        mine = sorted(folder.glob("visits-*.safetensors"))[self._rank::self._ranks]
        self._parts = [Visits(**load_file(file)) for file in mine]
        if self._parts:
            write_part(self._folder, 1, self._written, self._rank, Visits.joined(self._parts))

    def see(self, pair_ids: tuple[int, ...], pairs: PairLogps) -> None:
        """Takes the rewards of a pack's pairs, fillers left out; nothing where the loss has no rewards."""
        found = rewards(pairs, self._loss)
        if found is not None and pair_ids:
            self._step.append((pair_ids, torch.stack(found).float()))

    def end_step(self, step: int) -> None:
        """Ends the step that the packs were of: their values are read at the next one."""
        self._catch_up()
        packs, self._step = self._step, []
        if packs:
            ids = np.array([i for pair_ids, _ in packs for i in pair_ids], np.int32)
            self._waiting = step, ids, Later(torch.cat([values for _, values in packs], 1))

    def of_step(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(pairs, their (2, B) rewards) of a step that is not written yet; none where the loss has no rewards."""
        self._catch_up()
        none = np.empty(0, np.int32), np.empty((2, 0), np.float32)
        return next(((ids, values) for number, ids, values in self._known if number == step), none)

    def write(self, step: int) -> None:
        """Writes what is known up to this step; after it, a checkpoint of the step has all visits before it."""
        self._catch_up()
        known, self._known = self._known, []
        first, self._written = self._written + 1, step
        if known:
            visits = Visits.of([(np.full(len(ids), number, np.int32), ids, *values) for number, ids, values in known])
            self._parts.append(visits)
            write_part(self._folder, first, step, self._rank, visits)

    def _catch_up(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            step, ids, values = waiting
            self._known.append((step, ids, values.values.numpy()))
            self.newest = ids, self._known[-1][2]
