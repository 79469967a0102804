"""Matrices that ZeRO 1 to 3 have cut: one rank puts each together, makes it orthogonal, and takes it apart again.

Each rank owns about as many. What travels is what a rank holds of the others' matrices: in bf16, there and back.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_dist.policy.optimizers.muon import Orthogonalized, Parts
from dpo_dist.policy.optimizers.weights import TrainedWeights
from dpo_dist.policy.parts import Part, flat_tensors, part_of
from dpo_dist.runtime.world import World


@dataclass(frozen=True)
class Matrix:
    shape: torch.Size
    parts: dict[int, Part]                 # by rank; together all of it, in order of rank
    owner: int                             # the rank that makes it orthogonal


def parts_of(optimizer: Any, weights: TrainedWeights, world: World) -> dict[Tensor, Parts]:
    """{this rank's flat tensor: what makes the parts of matrices in it orthogonal}, of DeepSpeed's optimizer. All ranks
    call it."""
    own = [part_of(optimizer, p, world) for p in weights.matrices]
    everyones = world.gather(own)
    by_tensor: dict[int, list[Matrix]] = {}
    loads = [0.0] * world.size
    for matrix, *parts in zip(weights.matrices, *everyones, strict=True):
        held = {rank: part for rank, part in enumerate(parts) if part is not None}
        shape = weights.shapes[matrix]
        owner = _owner(held, loads)
        loads[owner] += shape.numel() * min(shape[-2:])
        by_tensor.setdefault(next(iter(held.values())).tensor, []).append(Matrix(shape, held, owner))
    flat = flat_tensors(optimizer)
    return {flat[i]: _exchanged(matrices, world) for i, matrices in by_tensor.items()}


def _owner(parts: dict[int, Part], loads: list[float]) -> int:
    """Of the ranks that hold most of a matrix, the one with the least to do."""
    most = max(part.length for part in parts.values())
    return min((rank for rank, part in parts.items() if 2 * part.length > most), key=lambda rank: loads[rank])


def _exchanged(matrices: list[Matrix], world: World) -> Parts:
    """What makes the parts of these matrices orthogonal, which lie in one flat tensor of each rank."""
    me, ranks = world.rank, range(world.size)
    own = [m for m in matrices if m.owner == me]
    # what goes from here to each owner, and what comes from each rank for the matrices that are owned here
    held = [[(m, m.parts[me]) for m in matrices if m.owner == owner and me in m.parts] for owner in ranks]
    wanted = [[m.parts[rank].length for m in own if rank in m.parts] for rank in ranks]

    def parts(direction: Tensor, orthogonalize: Callable[[Tensor], Tensor]) -> Orthogonalized:
        outgoing = [torch.cat([direction[part.start:part.start + part.length] for _, part in to] or [direction[:0]])
                    for to in held]
        came = world.exchange(outgoing, [sum(lengths) for lengths in wanted])
        pieces = [iter(sent.split(lengths)) for sent, lengths in zip(came, wanted, strict=True)]
        done = [orthogonalize(torch.cat([next(pieces[rank]) for rank in m.parts]).view(m.shape)).flatten() for m in own]
        back = [torch.cat([whole[m.parts[rank].first:][:m.parts[rank].length]
                           for m, whole in zip(own, done, strict=True) if rank in m.parts] or [direction[:0]])
                for rank in ranks]
        returned = world.exchange(back, [len(sent) for sent in outgoing])
        return [(slice(part.start, part.start + part.length), values, m.shape)
                for sent, to in zip(returned, held, strict=True)
                for (m, part), values in zip(to, sent.split([part.length for _, part in to]), strict=True)]

    return parts
