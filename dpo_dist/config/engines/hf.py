"""hf: the whole reference on every rank, by transformers and torch; or read from disk, one layer at a time."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import option
from dpo_dist.config.reference import ReferenceConfig

if TYPE_CHECKING:
    from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class HfConfig(ReferenceConfig):
    engine: Literal["hf"] = option()
    offload: Literal["none", "disk"] = option(default="none")

    may_follow = True

    @property
    def computes_quantized(self) -> bool:
        return self.offload == "none"

    @property
    def may_adapt(self) -> bool:
        return self.offload == "none"                    # adapters are in memory, not in the base's files

    @property
    def may_fuse(self) -> bool:
        return self.offload == "none"                    # weights read from disk are used by the model's own code

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        return piece if self.offload == "disk" else 1.0

    def check(self, run: RunConfig) -> None:
        if self.sync.mode != "none" and self.offload == "disk":
            raise UserError(f"reference.sync.mode={self.sync.mode} cannot move weights that stay in their files; set "
                            "reference.offload=none")
