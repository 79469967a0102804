"""The cache as an engine: no model in memory, the log-probs come from disk."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.cache.store import LogpCache
from dpo_dist.types import PackedBatch


class CachedReference(ReferenceEngine):
    """The cache holds the values of all completion tokens, whichever a pack counts."""

    def __init__(self, cache: LogpCache):
        self._cache = cache

    def token_logps(self, batch: PackedBatch) -> Tensor:
        found = [self._cache.logps(prompt, completion) for prompt, completion in batch.sequences()]
        return batch.counted(torch.from_numpy(np.concatenate(found)))

    def look_up(self, batch: PackedBatch) -> Tensor | None:
        return self.token_logps(batch)
