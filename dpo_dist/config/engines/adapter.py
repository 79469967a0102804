"""adapter: for LoRA, the policy's base with a second adapter, which stays frozen."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_dist.config.adapter import is_adapter
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import option
from dpo_dist.config.reference import OfPolicyConfig

if TYPE_CHECKING:
    from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class AdapterReferenceConfig(OfPolicyConfig):
    engine: Literal["adapter"] = option()

    adapter_beside = True

    @property
    def may_adapt(self) -> bool:
        return True

    def check(self, run: RunConfig) -> None:
        super().check(run)
        if self.path is None and run.model.lora.rank:
            raise UserError("reference.engine=adapter with reference.path=null is the adapter that training starts "
                            "from, but model.lora.rank starts a fresh one, which is the base itself; set "
                            "reference=adapter_off, or reference.path to an adapter")
        if self.path is not None and Path(self.path).is_dir() and not is_adapter(Path(self.path)):
            raise UserError(f"reference.path={self.path} is no adapter, which reference.engine=adapter needs; set "
                            "reference=hf or reference=zero")
