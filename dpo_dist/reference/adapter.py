"""For LoRA: the reference is the policy's base with another adapter, frozen, beside the one that is trained. Exact, and
no second model in memory."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from dpo_dist.config.engines.adapter import AdapterReferenceConfig
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.adapter_off import HasAdapters
from dpo_dist.types import PackedBatch

if TYPE_CHECKING:
    from dpo_dist.reference.make import Setup


def open_engine(config: AdapterReferenceConfig, setup: Setup) -> AdapterReference:
    assert setup.policy is not None, "the policy holds the reference's adapter"
    return AdapterReference(setup.policy)


class AdapterReference(ReferenceEngine):
    def __init__(self, policy: HasAdapters):
        self._policy = policy

    def token_logps(self, batch: PackedBatch) -> Tensor:
        with self._policy.evaluating(), self._policy.reference_adapter():
            return self._policy.token_logps(batch).logps

    def at_temperature(self, temperature: float) -> AbstractContextManager[None]:
        return nullcontext()             # the heads are the policy's, at the policy's temperature
