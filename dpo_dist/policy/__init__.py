"""The policy: what the training loop needs of the model that learns. zero.py uses DeepSpeed, single.py plain torch."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.models.load import ScoredModel, token_logps
from dpo_dist.models.lora import REFERENCE, TRAINED
from dpo_dist.models.weights import adapter_weights
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.types import PackedBatch, TokenLogps


class Policy(ABC):
    """Where the model is sharded, all ranks call every method, the same number of times."""

    model: ScoredModel
    _engine: Any                             # what is called: the model itself, or DeepSpeed's engine around it
    _device: torch.device
    is_sharded = False                       # whether forwards gather weights, so that all ranks must make as many

    def token_logps(self, batch: PackedBatch, collision: bool = False) -> TokenLogps:
        """Log-probs of the pack's completion tokens, with gradient outside `evaluating`."""
        return token_logps(self._engine, batch.to(self._device), collision)

    @abstractmethod
    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds the gradient of this rank's share of the loss. The step's gradient is the SUM over ranks and calls."""

    @abstractmethod
    def step(self, lr: float, skip: Tensor | None = None) -> Tensor:
        """Clips, updates the weights and clears the gradients. Returns the gradients' global norm before clipping, a
        scalar on any device; negative or not finite where the gradients are not finite. skip: a float32 scalar on the
        device, 1 to change no weight, else 0; the process does not wait for it.
        """

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside: no gradients, no dropout."""
        was_training = self._engine.training             # may be nested: adapter_off scores while an evaluation runs
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train(was_training)

    def adapters_off(self) -> AbstractContextManager[None]:
        """Inside: the base model without its LoRA adapters."""
        return self.model.lm.disable_adapter()

    @contextmanager
    def reference_adapter(self) -> Iterator[None]:
        """Inside: the base model with the reference's adapter in place of the one that is trained."""
        self.model.lm.set_adapter(REFERENCE, inference_mode=True)
        yield
        self.model.lm.set_adapter(TRAINED)

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside: these of the model's parameters are whole on every rank, as they always are unless it is sharded."""
        return nullcontext()

    @abstractmethod
    def files(self) -> dict[str, TensorFile]:
        """What this rank writes of the trained weights and the optimizer's state, as views."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Takes the state whose `files` are in the folder, written by any number of ranks under any ZeRO stage."""

    @abstractmethod
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name for from_pretrained, whole CPU tensor) one at a time, adapters merged; empty except on rank 0."""

    def export_adapter(self, keep: bool) -> dict[str, Tensor]:
        """{name as in adapter_model.safetensors: whole CPU tensor} of the trained adapter; empty if not `keep`, which
        is true on one rank."""
        return adapter_weights(self.model, self.gathered, keep)
