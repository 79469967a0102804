"""The policy under DeepSpeed ZeRO, stages 0 to 3, on any number of ranks."""
from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dpo_dist.config.schema import OptimConfig, ZeroConfig
from dpo_dist.models.cost import layer_elements
from dpo_dist.models.load import ScoredModel
from dpo_dist.models.sharded import sharded_load
from dpo_dist.models.text import layer_stack
from dpo_dist.models.weights import merged_weights
from dpo_dist.policy import Policy
from dpo_dist.policy.matrix_parts import parts_of
from dpo_dist.policy.optimizers.make import optimizer_module
from dpo_dist.policy.optimizers.muon import MuonAndAdamW
from dpo_dist.policy.optimizers.weights import trained_weights
from dpo_dist.policy.skip import prepare_update
from dpo_dist.policy.zero_config import deepspeed_config
from dpo_dist.runtime.world import World, prepare_deepspeed

STATE = "state"                     # the tag under which DeepSpeed keeps its files in a checkpoint's folder


class ZeroPolicy(Policy):
    def __init__(self, load_model: Callable[[], ScoredModel], zero: ZeroConfig, optim: OptimConfig, dtype: torch.dtype,
                 world: World):
        prepare_deepspeed(world.device)
        self._world, self._device, self._stage = world, world.device, zero.stage
        self.is_sharded = zero.stage == 3
        bf16, on_gpu = dtype == torch.bfloat16, world.device.type == "cuda"
        config = deepspeed_config(zero, optim, bf16, on_gpu)
        with sharded_load(config):
            self.model = load_model().train()
        weights = trained_weights(self.model)
        optimizer = optimizer_module(optim).make_optimizer(optim, weights)
        layers = layer_stack(self.model.causal)
        if zero.stage == 3 and all(p.requires_grad for p in layers.parameters()):
            # a layer's weights are gathered together, by one hook instead of thirteen. Not with adapters: DeepSpeed
            # fails on frozen weights
            deepspeed.utils.set_z3_leaf_modules(self.model, list({type(layer) for layer in layers}))
        config = deepspeed_config(zero, optim, bf16, on_gpu, layer_elements(layers))
        self._optimizer = optimizer                      # DeepSpeed gives it the fp32 parts, and calls its step
        self._engine = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)[0]
        if isinstance(optimizer, MuonAndAdamW) and zero.stage:
            optimizer.parts_of = parts_of(self._engine.optimizer, weights, world)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over ranks; the step's loss is a sum over them
        self._engine.backward(loss * self._world.size)
        if not is_last:
            self._engine.step()                          # tells the engine that a micro-step is over; changes no weight

    def step(self, lr: float, skip: Tensor | None = None) -> Tensor:
        if skip is not None and self._engine.zero_cpu_offload():
            skip = skip.cpu()                            # it would read a copy that has not arrived yet
        prepare_update(self._optimizer, lr, skip)
        # under stage 0 no optimizer of DeepSpeed's knows the norm, but every rank holds whole, averaged gradients
        own = (torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
               if self._stage == 0 else None)
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm() if own is None else own)

    def save(self, folder: Path) -> None:
        frozen = any(not p.requires_grad for p in self.model.parameters())
        self._engine.save_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=frozen)
        if self._world.is_main:
            (folder / "world.json").write_text(json.dumps({"ranks": self._world.size, "zero_stage": self._stage}))

    def load(self, folder: Path) -> None:
        saved = json.loads((folder / "world.json").read_text())
        if saved == {"ranks": self._world.size, "zero_stage": self._stage}:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=False)
        else:
            loaded = self._load_universal(folder)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")

    def _load_universal(self, folder: Path) -> Any:
        """A checkpoint of another number of ranks, through DeepSpeed's universal format."""
        universal = folder / "universal"
        self._world.on_main(lambda: _convert(folder / STATE, universal))
        self._engine._config.load_universal_checkpoint = True
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=universal.name, load_module_strict=False)
        finally:
            self._engine._config.load_universal_checkpoint = False
        for state in self._engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                # DeepSpeed shares one tensor among all of them, and each would increment it
                state["step"] = state["step"].clone()
        return loaded

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        return merged_weights(self.model, self.gathered, keep=self._world.is_main)

    def gathered(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3)


def _convert(saved: Path, universal: Path) -> None:
    """Writes the universal form beside the checkpoint, whole or not at all."""
    if universal.exists():
        return
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    partial = universal.with_name("universal.partial")
    shutil.rmtree(partial, ignore_errors=True)
    ds_to_universal(Namespace(input_folder=str(saved), output_folder=str(partial), num_extract_workers=1,
                              num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True))
    partial.rename(universal)
