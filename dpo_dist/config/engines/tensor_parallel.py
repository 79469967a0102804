"""tensor_parallel: each layer split over the ranks of a node by DeepSpeed's inference engine."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_dist.config.options import option
from dpo_dist.config.reference import ReferenceConfig


@dataclass(frozen=True)
class TensorParallelConfig(ReferenceConfig):
    engine: Literal["tensor_parallel"] = option()
    tensor_parallel_size: int | None = option(above=0, default=None)

    uses_deepspeed = True

    @property
    def may_fuse(self) -> bool:
        return False                                     # DeepSpeed replaces the layers

    def recipe(self, rounds: bool, ranks_of_node: int) -> list[str]:
        size = self.tensor_parallel_size or ranks_of_node
        # partial sums are rounded before they are added
        return [f"layers split over {size} ranks"] if rounds and size > 1 else []

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        return 1.0 / (self.tensor_parallel_size or ranks // nodes)
