"""zero: the reference sharded over all ranks by DeepSpeed ZeRO-3."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_dist.config.options import option
from dpo_dist.config.reference import ReferenceConfig


@dataclass(frozen=True)
class ZeroReferenceConfig(ReferenceConfig):
    engine: Literal["zero"] = option()
    offload: Literal["none", "cpu"] = option(default="none")

    uses_deepspeed = True
    gathers_weights = True
    may_follow = True
    needs_less = "reference.offload=cpu"

    @property
    def may_adapt(self) -> bool:
        return True

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        return 0.0 if self.offload == "cpu" else 1.0 / ranks
