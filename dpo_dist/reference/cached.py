"""The cache as an engine: no model in memory, the log-probs come from disk."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpo_dist.preference import PackedBatch
from dpo_dist.reference.cache import LogpCache


class CachedReference:
    def __init__(self, cache: LogpCache):
        self._cache = cache

    def token_logps(self, batch: PackedBatch) -> Tensor:
        ids = batch.input_ids[0].numpy()
        values = [self._cache.logps(ids[slice(*tree.prompt)], ids[slice(*branch)]) for tree in batch.trees for branch in tree.branches]
        return torch.from_numpy(np.concatenate(values))

    def close(self) -> None:
        """Nothing is held."""
