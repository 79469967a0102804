"""The oracle: the whole reference model on every rank, by transformers and torch. Other engines are held against it."""
from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor

from dpo_dist.models.load import ScoredModel, load_causal_lm, token_logps
from dpo_dist.preference import PackedBatch


class HfReference:
    """Data-parallel: each rank scores packs of its own."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device):
        self._model: ScoredModel | None = ScoredModel(load_causal_lm(folder, dtype, attention), attention).to(device).eval()
        self._model.requires_grad_(False)
        self._device = device

    def token_logps(self, batch: PackedBatch) -> Tensor:
        assert self._model is not None, "the engine is closed"
        with torch.no_grad():
            return token_logps(self._model, batch.to(self._device)).logps

    def close(self) -> None:
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
