"""reference.sync: a reference that follows the policy (TR-DPO, arXiv 2404.09656), part of the way (soft) or all of it
(hard)."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors
import torch
from torch import Tensor, nn

from dpo_dist.config.errors import UserError
from dpo_dist.config.reference import SyncConfig
from dpo_dist.models.head import tempered
from dpo_dist.reference import ReferenceEngine
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch


@runtime_checkable
class HasWeights(Protocol):
    """An engine whose weights are at hand."""

    @property
    def model(self) -> nn.Module: ...

    def token_logps(self, batch: PackedBatch) -> Tensor: ...

    def close(self) -> None: ...


class Leader(Protocol):
    """What this needs of the policy (which it does not import)."""

    @property
    def model(self) -> nn.Module: ...

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]: ...


class TrDpoReference(ReferenceEngine):
    """An engine whose weights move every few steps: reference ← alpha · policy + (1 - alpha) · reference.

    Each rank moves the part of a weight that it holds. Computed in fp32, kept in the model's dtype.
    """

    def __init__(self, engine: HasWeights, policy: Leader, sync: SyncConfig, world: World):
        self._engine, self._policy, self._world = engine, policy, world
        self._alpha, self._every = sync.share, sync.every_steps
        self._weights = dict(engine.model.named_parameters())
        wanted = {name: _shape(weight) for name, weight in policy.model.named_parameters()}
        if {name: _shape(weight) for name, weight in self._weights.items()} != wanted:
            raise UserError(f"reference.sync.mode={sync.mode} moves the reference to the policy's weights, but "
                            "reference.path is a model of another shape than model.path; set reference.sync.mode=none")

    def token_logps(self, batch: PackedBatch) -> Tensor:
        return self._engine.token_logps(batch)

    def at_temperature(self, temperature: float) -> AbstractContextManager[None]:
        return tempered(self._engine.model, temperature)

    def close(self) -> None:
        self._engine.close()

    def after_step(self, step: int) -> None:
        if self._every and step % self._every == 0:
            for name, leading in self._policy.model.named_parameters():
                self._move(self._weights[name], leading)

    def _move(self, weight: nn.Parameter, leading: nn.Parameter) -> None:
        part, start = self._own_part(weight)
        # both are sharded the same way: nothing to gather
        if _is_sharded(leading) and _is_sharded(weight):
            part.copy_(torch.lerp(part.float(), self._own_part(leading)[0].to(part.device).float(), self._alpha))
        else:
            with self._policy.gathered([leading]):
                goal = leading.detach().view(-1)[start:start + len(part)]
                part.copy_(torch.lerp(part.float(), goal.to(part.device).float(), self._alpha))
        _forget_whole(weight)

    def _own_part(self, weight: nn.Parameter) -> tuple[Tensor, int]:
        """(the elements of a weight that this rank holds, flat, without padding; the place of the first)."""
        if not _is_sharded(weight):
            return weight.detach().view(-1), 0
        held: Any = weight
        start = self._world.rank * held.ds_tensor.numel()
        return held.ds_tensor.detach()[:max(0, held.ds_numel - start)], start

    # ---------------------------------------------------------------------------------------------------------- on disk

    def files(self) -> dict[str, TensorFile]:
        """reference-RANK.safetensors: each rank's parts, flat. If every rank holds all of it, only rank 0 writes."""
        if not self._world.is_main and not any(_is_sharded(weight) for weight in self._weights.values()):
            return {}
        parts = {name: self._own_part(weight)[0] for name, weight in self._weights.items()}
        return {f"reference-{self._world.rank:05d}.safetensors": TensorFile(parts)}

    def load(self, folder: Path) -> None:
        files = [safetensors.safe_open(path, framework="pt") for path in sorted(folder.glob("reference-*.safetensors"))]
        for name, weight in self._weights.items():
            part, start = self._own_part(weight)
            part.copy_(_read(files, name, start, start + len(part)))
            _forget_whole(weight)


def _is_sharded(weight: nn.Parameter) -> bool:
    return hasattr(weight, "ds_tensor")


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.ds_shape if _is_sharded(weight) else weight.shape)


def _forget_whole(weight: Any) -> None:
    """Drops ZeRO's whole copy of a small weight, so that it is gathered again from the changed parts."""
    if _is_sharded(weight) and weight.ds_status.name == "AVAILABLE":
        weight.partition()


def _read(files: Sequence[Any], name: str, start: int, end: int) -> Tensor:
    """Elements start to end of a weight whose parts lie in these files, one after the other."""
    found, at = [torch.empty(0)], 0
    for file in files:
        part = file.get_slice(name)
        size = part.get_shape()[0]
        if at < end and start < at + size:
            found.append(part[max(0, start - at):end - at])
        at += size
    return torch.cat([part.to(found[-1].dtype) for part in found])
