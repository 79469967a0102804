"""Which pairs form step N: a function of seed, epoch and data digest alone (law 3)."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Order:
    """The endless sequence of shuffled epochs, cut into steps of `pairs_per_step`; a step may span two epochs.

    A source of weight w gives w copies of each of its pairs an epoch; of a fraction, a fresh random part each epoch.
    """

    seed: int
    data_digest: str
    sources: np.ndarray                      # (n,) the source index of each pair
    weights: Sequence[float]                 # by source index
    pairs_per_step: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def pairs_per_epoch(self) -> int:
        counts = np.bincount(self.sources, minlength=len(self.weights))
        return int(sum(math.floor(w) * n + round((w % 1) * n) for w, n in zip(self.weights, counts, strict=True)))

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        return max_steps or max(1, math.ceil(round(epochs * self.pairs_per_epoch) / self.pairs_per_step))

    def pairs_of_step(self, step: int, epochs: float, max_steps: int | None) -> np.ndarray:
        """(≤ pairs_per_step,) pair indexes of step 1, 2, …; the last step of a run by epochs may be short."""
        start, end = (step - 1) * self.pairs_per_step, step * self.pairs_per_step
        if max_steps is None:
            end = min(end, max(1, round(epochs * self.pairs_per_epoch)))
        per_epoch, parts = self.pairs_per_epoch, []
        while start < end:
            epoch, at = divmod(start, per_epoch)
            parts.append(self.epoch(epoch)[at:at + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> np.ndarray:
        """(pairs_per_epoch,) pair indexes of one epoch, shuffled."""
        if epoch not in self._epochs:
            self._epochs.clear()             # one epoch at a time is enough, and memory stays flat
            key = hashlib.sha256(f"{self.seed}/{epoch}/{self.data_digest}".encode()).digest()
            random = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little")))
            copies = [self._of_source(np.flatnonzero(self.sources == i), w, random) for i, w in enumerate(self.weights)]
            self._epochs[epoch] = random.permutation(np.concatenate(copies))
        return self._epochs[epoch]

    @staticmethod
    def _of_source(pairs: np.ndarray, weight: float, random: np.random.Generator) -> np.ndarray:
        part = random.permutation(pairs)[:round((weight % 1) * len(pairs))]
        return np.concatenate([np.repeat(pairs, math.floor(weight)), part])
