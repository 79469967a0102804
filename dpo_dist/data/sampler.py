"""Which pairs form step N. Seed, epoch and data digest alone decide it (the law: order is a function)."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_dist.config.schema import TrainConfig
from dpo_dist.data.store import PairStore

Indexes = NDArray[np.int64]


class Sampler(Protocol):
    def total_steps(self, epochs: float, max_steps: int | None) -> int: ...

    def pairs_of_step(self, step: int, epochs: float, max_steps: int | None) -> Indexes:
        """(<= pairs_per_step,) pair indexes of step 1, 2, ..."""
        ...


@dataclass(frozen=True)
class Shuffle:
    """One epoch after the other, each a permutation of its own.

    A source of weight w gives w copies of each of its pairs an epoch; of a fraction, a fresh random part each epoch.
    """

    seed: int
    data_digest: str
    sources: NDArray[np.uint16]              # (n,) the source index of each pair
    weights: Sequence[float]                 # by source index
    _epochs: dict[int, Indexes] = field(default_factory=dict, repr=False)

    @cached_property
    def pairs_per_epoch(self) -> int:
        counts = np.bincount(self.sources, minlength=len(self.weights))
        return int(sum(math.floor(w) * n + round((w % 1) * n) for w, n in zip(self.weights, counts, strict=True)))

    def epoch(self, epoch: int) -> Indexes:
        """(pairs_per_epoch,) pair indexes of one epoch, shuffled."""
        if epoch not in self._epochs:
            self._epochs.clear()             # one epoch at a time is enough, and memory stays flat
            key = hashlib.sha256(f"{self.seed}/{epoch}/{self.data_digest}".encode()).digest()
            random = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little")))
            copies = [self._of_source(np.flatnonzero(self.sources == i), w, random) for i, w in enumerate(self.weights)]
            self._epochs[epoch] = random.permutation(np.concatenate(copies))
        return self._epochs[epoch]

    @staticmethod
    def _of_source(pairs: Indexes, weight: float, random: np.random.Generator) -> Indexes:
        part = random.permutation(pairs)[:round((weight % 1) * len(pairs))]
        return np.concatenate([np.repeat(pairs, math.floor(weight)), part])


@dataclass(frozen=True)
class PairSampler:
    """Shuffled epochs without end, cut into steps of `pairs_per_step`. A step may span two epochs."""

    shuffle: Shuffle
    pairs_per_step: int

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        return max_steps or max(1, math.ceil(round(epochs * self.shuffle.pairs_per_epoch) / self.pairs_per_step))

    def pairs_of_step(self, step: int, epochs: float, max_steps: int | None) -> Indexes:
        per_epoch, parts = self.shuffle.pairs_per_epoch, []
        start, end = (step - 1) * self.pairs_per_step, step * self.pairs_per_step
        if max_steps is None:
            end = min(end, max(1, round(epochs * per_epoch)))
        while start < end:
            epoch, at = divmod(start, per_epoch)
            parts.append(self.shuffle.epoch(epoch)[at:at + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)


@dataclass(frozen=True)
class PromptSampler:
    """Shuffled epochs of whole prompts: all pairs of a prompt lie in one step, where what they share is computed once.

    A step takes the next prompts while their pairs fit into `pairs_per_step`, and never spans two epochs, so it may be
    smaller; a prompt with more pairs than that is cut into steps.
    """

    shuffle: Shuffle
    pairs_per_step: int
    prompts: NDArray[np.uint64]              # (n,) equal numbers, equal prompts
    _steps: dict[int, tuple[Indexes, Indexes]] = field(default_factory=dict, repr=False)
    _n_steps: dict[int, int] = field(default_factory=dict, repr=False)

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        if max_steps:
            return max_steps
        whole, part = divmod(epochs, 1)
        steps = sum(self._steps_of(epoch) for epoch in range(int(whole)))
        return max(1, steps + (round(part * self._steps_of(int(whole))) if part else 0))

    def pairs_of_step(self, step: int, epochs: float, max_steps: int | None) -> Indexes:
        epoch, at = 0, step - 1
        while at >= self._steps_of(epoch):
            at -= self._steps_of(epoch)
            epoch += 1
        pairs, bounds = self._epoch(epoch)
        return pairs[bounds[at]:bounds[at + 1]]

    def _steps_of(self, epoch: int) -> int:
        if epoch not in self._n_steps:
            self._n_steps[epoch] = len(self._epoch(epoch)[1]) - 1
        return self._n_steps[epoch]

    def _epoch(self, epoch: int) -> tuple[Indexes, Indexes]:
        """(the epoch's pairs with those of a prompt side by side, where its steps begin and end)."""
        if epoch not in self._steps:
            self._steps.clear()
            shuffled = self.shuffle.epoch(epoch)
            _, first, group = np.unique(self.prompts[shuffled], return_index=True, return_inverse=True)
            place = first[group]                                     # a prompt takes the place of its first pair
            order = np.argsort(place, kind="stable")
            starts = np.flatnonzero(np.diff(place[order], prepend=-1))
            self._steps[epoch] = shuffled[order], _whole_prompts(np.append(starts, len(order)), self.pairs_per_step)
        return self._steps[epoch]


def make_sampler(pairs: PairStore, train: TrainConfig, group_by_prompt: bool) -> Sampler:
    """The order in which a run goes through its pairs."""
    shuffle = Shuffle(train.seed, pairs.digest, pairs.source, pairs.source_weights)
    if group_by_prompt:
        return PromptSampler(shuffle, train.pairs_per_step, pairs.content[:, 0])
    return PairSampler(shuffle, train.pairs_per_step)


def _whole_prompts(starts: Indexes, pairs_per_step: int) -> Indexes:
    """Bounds of steps of at most `pairs_per_step` pairs. Only a prompt that is larger than a step is cut."""
    bounds = [0]
    while bounds[-1] < starts[-1]:
        end = int(starts[np.searchsorted(starts, bounds[-1] + pairs_per_step, side="right") - 1])
        bounds.append(end if end > bounds[-1] else min(bounds[-1] + pairs_per_step, int(starts[-1])))
    return np.array(bounds, dtype=np.int64)
