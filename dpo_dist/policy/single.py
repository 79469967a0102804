"""The policy in one process with plain torch. Tests and small experiments use it, and zero.py must equal it."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dpo_dist.config.schema import OptimConfig
from dpo_dist.models.load import ScoredModel, token_logps
from dpo_dist.models.weights import merged_weights
from dpo_dist.policy.master_weights import MasterWeights
from dpo_dist.policy.skip import skip_update_if
from dpo_dist.types import PackedBatch, TokenLogps


class SinglePolicy:
    def __init__(self, model: ScoredModel, optim: OptimConfig, device: torch.device):
        self.model = model.to(device).train()
        self._device, self._clip = device, optim.max_grad_norm
        self._trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._masters = MasterWeights(self._trained.values())
        self._optimizer = torch.optim.AdamW(self._masters.parameters, lr=0.0, betas=optim.betas, eps=optim.eps,
                                            weight_decay=optim.weight_decay, fused=True)

    def token_logps(self, batch: PackedBatch, collision: bool = False) -> TokenLogps:
        return token_logps(self.model, batch.to(self._device), collision)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self, lr: float, skip: Tensor | None = None) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._masters.parameters, self._clip or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        skip_update_if(self._optimizer, skip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._masters.publish()
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        was_training = self.model.training               # may be nested: adapter_off scores while an evaluation runs
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train(was_training)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        with self.model.lm.disable_adapter():
            yield

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        weights = {n: p.detach().contiguous() for n, p in zip(self._trained, self._masters.parameters, strict=True)}
        safetensors.torch.save_file(weights, folder / "weights.safetensors")
        torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in zip(self._trained, self._masters.parameters, strict=True):
                parameter.copy_(weights[name])
        self._masters.publish()
        self._optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from merged_weights(self.model)
