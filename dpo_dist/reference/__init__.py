"""The reference: a ReferenceEngine answers with log-probs of a pack; a cache keeps them.

An engine is its file here, its options in config/engines/ and its YAML in conf/reference/."""
# ruff: noqa: B027                       # methods that do nothing are meant: a frozen model needs no more
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dpo_dist.types import PackedBatch

if TYPE_CHECKING:                            # who only reads the cache does not wait for torch
    from torch import Tensor

    from dpo_dist.runtime.tensor_file import TensorFile


class ReferenceEngine(ABC):
    """A model that scores packs. Every engine must match `hf` to 1e-5 a token in fp32 (the law: one log-prob).

    Engines inherit from this and write `token_logps`; the other methods do what is right for a frozen model. All ranks
    call every method.
    """

    packs_at_once: int = 1                   # how many to have in progress: several if servers compute

    @abstractmethod
    def token_logps(self, batch: PackedBatch) -> Tensor:
        """(N,) float32 log-probs in nats of the pack's counted tokens, on any device. The batch is on the CPU. Where
        the engine is sharded, all ranks call it the same number of times."""

    def look_up(self, batch: PackedBatch) -> Tensor | None:
        """(N,) float32 on the CPU, as token_logps, where the values are at hand and nothing has to be computed or
        waited for; else None. Called by the thread that packs the next step: what others compute may begin here."""
        return None

    def at_temperature(self, temperature: float) -> AbstractContextManager[None] | None:
        """Inside: token_logps are of what is sampled at this temperature, for any sequences. None where the engine
        cannot: it has no model at hand."""
        return None

    def close(self) -> None:
        """Frees the model's memory."""

    def wait_for(self, batches: Sequence[PackedBatch], before_waiting: Callable[[], None] = lambda: None) -> None:
        """Returns once this rank's packs can be answered for, on every rank; called before the packs of a step are
        forwarded. `before_waiting` is called, on all ranks alike, where that takes a while."""

    def after_step(self, step: int) -> None:
        """The policy has made its optimizer step 1, 2, ...: a reference that follows it moves."""

    def files(self) -> dict[str, TensorFile]:
        """{name: what this rank writes} of what a resumed run needs of it; nothing of a frozen model."""
        return {}

    def load(self, folder: Path) -> None:
        """Takes the state whose `files` are in the folder; at another number of ranks too."""


@runtime_checkable
class OutsideEngine(Protocol):
    """What an engine outside the training stack has besides: servers, each of which is audited alone."""

    urls: tuple[str, ...]

    def one_each(self) -> Iterable[ReferenceEngine]: ...
