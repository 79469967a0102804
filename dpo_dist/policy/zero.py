"""The policy under DeepSpeed ZeRO, stages 0 to 3, on any number of ranks."""
from __future__ import annotations

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
from dpo_dist.policy.parts import flat_tensors, part_of
from dpo_dist.policy.skip import prepare_update
from dpo_dist.policy.trained_state import TrainedState
from dpo_dist.policy.zero_config import deepspeed_config
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.runtime.world import World, prepare_deepspeed


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

    def files(self) -> dict[str, TensorFile]:
        return self._trained_state().files(self._world.rank)

    def load(self, folder: Path) -> None:
        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer.checkpoint_event_prologue()        # small weights, which are whole on every rank, are parts again
        self._trained_state().restore(folder, self._world.rank)
        if self._stage == 3:
            for i in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()        # and whole again
        elif self._stage:
            optimizer.update_lp_params()

    def _trained_state(self) -> TrainedState:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self._stage == 0:
            return TrainedState.whole(trained, self._optimizer.state, self._world.rank, self._world.size)
        own = {name: part_of(self._engine.optimizer, p, self._world) for name, p in trained.items()}
        return TrainedState(flat_tensors(self._engine.optimizer), {name: part for name, part in own.items() if part},
                            self._optimizer.state)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        return merged_weights(self.model, self.gathered, keep=self._world.is_main)

    def gathered(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3)

