"""The oracle: the whole reference model on every rank, by transformers and torch. Other engines are held against it."""
from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_dist.config.engines.hf import HfConfig
from dpo_dist.models.head import tempered
from dpo_dist.models.load import ScoredModel, release_memory, token_logps
from dpo_dist.models.lora import load_adapted
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.stream import load_streamed
from dpo_dist.reference import ReferenceEngine
from dpo_dist.types import PackedBatch

if TYPE_CHECKING:
    from dpo_dist.reference.make import Setup


def open_engine(config: HfConfig, setup: Setup) -> HfReference:
    return HfReference(setup.folder, setup.dtype, setup.attention, setup.world.device, config.offload,
                       setup.fused_for(config), setup.quantization)


class HfReference(ReferenceEngine):
    """Data-parallel: each rank scores packs of its own."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, attention: str, device: torch.device,
                 offload: str = "none", fused: bool = False, quantization: str = "none"):
        if offload == "disk":
            model = load_streamed(folder.base, dtype, attention, device)
        else:
            model = ScoredModel(load_adapted(folder, dtype, attention, fused, quantization), attention).to(device)
        self.model = model.eval().requires_grad_(False)
        self._device = device

    def token_logps(self, batch: PackedBatch) -> Tensor:
        with torch.no_grad():
            return token_logps(self.model, batch.to(self._device)).logps

    def at_temperature(self, temperature: float) -> AbstractContextManager[None]:
        return tempered(self.model, temperature)

    def close(self) -> None:
        del self.model
        release_memory(self._device)
