"""For LoRA: the reference is the policy's own base, with adapters off. Exact, and no second model in memory."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from dpo_dist.config.engines.adapter_off import AdapterOffConfig
from dpo_dist.reference import ReferenceEngine
from dpo_dist.types import PackedBatch, TokenLogps

if TYPE_CHECKING:
    from dpo_dist.reference.make import Setup


def open_engine(config: AdapterOffConfig, setup: Setup) -> AdapterOffReference:
    assert setup.policy is not None, "adapter_off scores with the policy"
    return AdapterOffReference(setup.policy)


class HasAdapters(Protocol):
    """What engines that are the policy need of it (which they do not import)."""

    def adapters_off(self) -> AbstractContextManager[None]: ...

    def reference_adapter(self) -> AbstractContextManager[None]: ...

    def evaluating(self) -> AbstractContextManager[None]: ...

    def token_logps(self, batch: PackedBatch, collision: bool = False) -> TokenLogps: ...


class AdapterOffReference(ReferenceEngine):
    def __init__(self, policy: HasAdapters):
        self._policy = policy

    def token_logps(self, batch: PackedBatch) -> Tensor:
        with self._policy.evaluating(), self._policy.adapters_off():
            return self._policy.token_logps(batch).logps

    def at_temperature(self, temperature: float) -> AbstractContextManager[None]:
        return nullcontext()             # the heads are the policy's, at the policy's temperature
