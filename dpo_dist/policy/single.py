"""The policy in one process with plain torch. Tests and small experiments use it, and zero.py must equal it."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dpo_dist.config.schema import OptimConfig
from dpo_dist.models.load import ScoredModel
from dpo_dist.models.weights import merged_weights
from dpo_dist.policy import Policy
from dpo_dist.policy.master_weights import MasterWeights
from dpo_dist.policy.optimizers.make import optimizer_module
from dpo_dist.policy.optimizers.weights import trained_weights
from dpo_dist.policy.skip import prepare_update
from dpo_dist.policy.trained_state import TrainedState
from dpo_dist.runtime.tensor_file import TensorFile


class SinglePolicy(Policy):
    def __init__(self, model: ScoredModel, optim: OptimConfig, device: torch.device):
        self.model = self._engine = model.to(device).train()
        self._device, self._clip = device, optim.max_grad_norm
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._masters = MasterWeights(trained.values())
        self._weights = dict(zip(trained, self._masters.parameters, strict=True))      # what is updated, by name
        self._optimizer = optimizer_module(optim).make_optimizer(optim, trained_weights(self.model, self._weights))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self, lr: float, skip: Tensor | None = None) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._masters.parameters, self._clip or float("inf"))
        prepare_update(self._optimizer, lr, skip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._masters.publish()
        return norm

    def files(self) -> dict[str, TensorFile]:
        return self._trained_state().files(rank=0)

    def load(self, folder: Path) -> None:
        self._trained_state().restore(folder, rank=0)
        self._masters.publish()

    def _trained_state(self) -> TrainedState:
        return TrainedState.whole(self._weights, self._optimizer.state)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        return merged_weights(self.model)
