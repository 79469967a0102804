"""The cache as an engine: no model in memory, the log-probs come from disk."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.cache.store import LogpCache, sequence_key
from dpo_dist.types import PackedBatch


class CachedReference(ReferenceEngine):
    def __init__(self, cache: LogpCache):
        self._cache = cache

    def token_logps(self, batch: PackedBatch) -> Tensor:
        return torch.from_numpy(np.concatenate([self._cache.logps(prompt, completion) for prompt, completion in _sequences(batch)]))

    def look_up(self, batch: PackedBatch) -> Tensor | None:
        return self.token_logps(batch)

    def keys(self, batch: PackedBatch) -> list[bytes]:
        """What the pack's sequences are called in the cache."""
        return [sequence_key(prompt, completion) for prompt, completion in _sequences(batch)]


def _sequences(batch: PackedBatch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ids = batch.input_ids[0].numpy()
    return ((ids[slice(*tree.prompt)], ids[slice(*branch)]) for tree in batch.trees for branch in tree.branches)
