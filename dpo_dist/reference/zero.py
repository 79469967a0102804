"""The reference sharded over all ranks by DeepSpeed ZeRO-3 without an optimizer; its shards may stay in CPU memory."""
from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch import Tensor

from dpo_dist.config.engines.zero import ZeroReferenceConfig
from dpo_dist.models.head import tempered
from dpo_dist.models.load import ScoredModel, release_memory, token_logps
from dpo_dist.models.lora import load_adapted
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.sharded import sharded_load
from dpo_dist.reference import ReferenceEngine
from dpo_dist.runtime.world import prepare_deepspeed
from dpo_dist.types import PackedBatch

if TYPE_CHECKING:
    from dpo_dist.reference.make import Setup


def open_engine(config: ZeroReferenceConfig, setup: Setup) -> ZeroReference:
    return ZeroReference(setup.folder, setup.dtype, setup.attention, setup.world.device, config.offload,
                         setup.fused_for(config))


class ZeroReference(ReferenceEngine):
    """Each rank scores its own packs and gathers a layer at a time. All ranks must score the same number of packs."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, attention: str, device: torch.device, offload: str,
                 fused: bool = False):
        prepare_deepspeed(device)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3, **({"offload_param": {"device": "cpu"}} if offload == "cpu" else {})},
        }
        with sharded_load(config):
            model = ScoredModel(load_adapted(folder, dtype, attention, fused), attention)
        model.eval().requires_grad_(False)
        self._engine: Any = deepspeed.initialize(model=model, config=config)[0]
        self._engine.eval()
        self._device = device

    @property
    def model(self) -> ScoredModel:
        return self._engine.module

    def token_logps(self, batch: PackedBatch) -> Tensor:
        with torch.no_grad():
            return token_logps(self._engine, batch.to(self._device)).logps

    def at_temperature(self, temperature: float) -> AbstractContextManager[None]:
        return tempered(self.model, temperature)

    def close(self) -> None:
        self._engine.destroy()
        self._engine = None
        release_memory(self._device)
