"""adapter_off: for LoRA, the policy with its adapters switched off."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import option
from dpo_dist.config.reference import ReferenceConfig

if TYPE_CHECKING:
    from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class AdapterOffConfig(ReferenceConfig):
    engine: Literal["adapter_off"] = option()

    is_policy = True
    bare_base = True
    why_not_ahead = ("with reference.engine=adapter_off the reference is the policy itself; set reference.mode=cached "
                     "or live, or reference.engine=hf")

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        return 1.0 / ranks if policy_is_sharded else 1.0

    def check(self, run: RunConfig) -> None:
        if not run.trains_adapter:
            raise UserError("reference.engine=adapter_off needs a LoRA policy; set model.lora.rank=16, or give an "
                            "adapter as model.path, or set reference.engine=hf")
        if self.path not in (None, run.model.path):
            raise UserError(f"reference.path={self.path} differs from model.path={run.model.path}, but adapter_off "
                            "takes the policy's own base weights as reference; remove reference.path or set "
                            "reference.engine=hf")
