"""The frozen reference: a ReferenceEngine answers with log-probs of a pack; a cache keeps them. One engine = one file + one YAML."""
from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dpo_dist.preference import PackedBatch


class ReferenceEngine(Protocol):
    """A frozen model that scores packs. Every engine must match `hf` to 1e-5 a token in fp32 (law 1)."""

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """(N,) float32 log-probs in nats of the pack's completion tokens, on any device. The batch is on the CPU. Where the engine
        is sharded, all ranks call it the same number of times."""

    def close(self) -> None:
        """Frees the model's memory."""
