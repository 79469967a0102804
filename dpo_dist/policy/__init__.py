"""The policy: what the training loop needs of the model that learns. zero.py uses DeepSpeed, single.py plain torch."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dpo_dist.models.load import ScoredModel
from dpo_dist.types import PackedBatch, TokenLogps


class Policy(Protocol):
    """Where the model is sharded, all ranks call every method, the same number of times."""

    model: ScoredModel

    def token_logps(self, batch: PackedBatch, collision: bool = False) -> TokenLogps:
        """Log-probs of the pack's completion tokens, with gradient outside `evaluating`."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds the gradient of this rank's share of the loss. The step's gradient is the SUM over ranks and calls."""

    def step(self, lr: float, skip: Tensor | None = None) -> Tensor:
        """Clips, updates the weights and clears the gradients. Returns the gradients' global norm before clipping, a
        scalar on any device; negative or not finite where the gradients are not finite. skip: a float32 scalar on the
        device, 1 to change no weight, else 0; the process does not wait for it.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside: no gradients, no dropout."""

    def adapters_off(self) -> AbstractContextManager[None]:
        """Inside: the base model without its LoRA adapters."""

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside: these of the model's parameters are whole on every rank."""

    def save(self, folder: Path) -> None:
        """Weights and optimizer state, each rank its part."""

    def load(self, folder: Path) -> None:
        """The state that `save` wrote; at another number of ranks too."""

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name for from_pretrained, whole CPU tensor) one at a time, adapters merged; empty except on rank 0."""
