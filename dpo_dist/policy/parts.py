"""What a rank holds of each trained weight, and where. DeepSpeed lays weights end to end in flat tensors, and gives
each rank a part of every weight (stage 3) or of every flat tensor (stages 1 and 2)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_dist.runtime.world import World


@dataclass(frozen=True)
class Part:
    """What a rank holds of a weight, whose elements are counted row by row."""

    tensor: int                            # of the rank's tensors
    start: int                             # where it lies there
    first: int                             # its first element
    length: int


def flat_tensors(optimizer: Any) -> list[Tensor]:
    """Of DeepSpeed's optimizer, this rank's, in fp32: for stage 3, stages 1 and 2, and stage 1 in bf16."""
    names = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
    return next(list(getattr(optimizer, name)) for name in names if hasattr(optimizer, name))


def part_of(optimizer: Any, p: Any, world: World) -> Part | None:
    """What this rank holds of a parameter of DeepSpeed's optimizer; None = nothing."""
    if hasattr(p, "ds_tensor"):                          # stage 3: every rank has an equal part of every parameter
        tensor, start, size = optimizer.grad_position[optimizer.get_param_id(p)]
        first = world.rank * size
        length = min(size, p.ds_numel - first)
        return Part(tensor, start, first, length) if length > 0 else None
    held = p._hp_mapping
    if held is None:
        return None
    return Part(held.param_group_index, held.hp_fragment_address.start, held.lp_fragment_address.start,
                held.hp_fragment_address.numel)
