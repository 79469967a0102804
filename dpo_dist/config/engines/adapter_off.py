"""adapter_off: for LoRA, the policy with its adapters switched off."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import option
from dpo_dist.config.reference import OfPolicyConfig

if TYPE_CHECKING:
    from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class AdapterOffConfig(OfPolicyConfig):
    engine: Literal["adapter_off"] = option()

    bare_base = True

    def check(self, run: RunConfig) -> None:
        super().check(run)
        if self.path not in (None, run.model.path):
            raise UserError(f"reference.path={self.path} differs from model.path={run.model.path}, but adapter_off "
                            "takes the policy's own base weights as reference; remove reference.path or set "
                            "reference.engine=hf")
