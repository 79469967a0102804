"""The cost of a forward in floating-point operations, from lengths alone: the planner and perf.py use it."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of a causal language model. A product of (m, k) and (k, n) counts 2 m k n; all else is not counted.

    `attention` holds, for each kind of layer, (FLOPs for each query and key that it sees, the layers' window or None).
    `padded`: each sequence is a row with its prompt, padded to the longest (see ScoredModel), so that no prompt is
    shared.
    """

    per_token: float                                     # the layers' matrices
    per_completion_token: float                          # the head's
    attention: tuple[tuple[float, int | None], ...]
    padded: bool = False

    def of_tokens(self, start: NDArray[np.integer], end: NDArray[np.integer]) -> Floats:
        """FLOPs of tokens start to end (exclusive) of sequences; each token sees all before it. Without the head."""
        cost = self.per_token * (end - start).astype(np.float64)
        for per_key, window in self.attention:
            cost += per_key * (_keys_seen(end, window) - _keys_seen(start, window))
        return cost

    def of_pairs(self, lengths: NDArray[np.integer]) -> tuple[Floats, Floats]:
        """(prompts (n,), completions with head (n, 2)) of pairs of lengths (n, 3) prompt, chosen, rejected."""
        prompt, completions = lengths[:, 0].astype(np.int64), lengths[:, 1:].astype(np.int64)
        after = self.of_tokens(np.broadcast_to(prompt[:, None], completions.shape), prompt[:, None] + completions)
        return self.of_tokens(np.zeros_like(prompt), prompt), after + self.per_completion_token * completions

    def training(self, frozen_base: bool) -> Flops:
        """Forward and backward. A matrix's backward costs two forwards, or one if it gets no gradient (LoRA's base)."""
        linear = 2 if frozen_base else 3
        return Flops(linear * self.per_token, linear * self.per_completion_token,
                     tuple((3 * per_key, window) for per_key, window in self.attention), self.padded)


def _keys_seen(n: NDArray[np.integer], window: int | None) -> Floats:
    """Keys that the first n queries of a sequence see together: 1 + 2 + ... + n, each at most `window`."""
    n = n.astype(np.float64)
    if window is None:
        return n * (n + 1) / 2
    full = np.minimum(n, window)
    return full * (full + 1) / 2 + (n - full) * window


@dataclass(frozen=True)
class StepWork:
    """A step's work on all ranks: pairs, forwarded tokens (with repeats and padding), FLOPs of its distinct tokens."""

    pairs: int = 0
    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(self.pairs + other.pairs, self.tokens + other.tokens, self.flops + other.flops)
