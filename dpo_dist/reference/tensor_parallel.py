"""The reference split inside each node by DeepSpeed's inference engine (AutoTP): each rank of a team holds a slice of
each layer."""
from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dpo_dist.config.engines.tensor_parallel import TensorParallelConfig
from dpo_dist.config.errors import UserError
from dpo_dist.models.folder import read_config, stored_dtype
from dpo_dist.models.load import ScoredModel, load_causal_lm, release_memory
from dpo_dist.models.text import has_other_parts, setting
from dpo_dist.models.tiny import tiny_backbone
from dpo_dist.reference import ReferenceEngine
from dpo_dist.runtime.world import Team, World, prepare_deepspeed
from dpo_dist.types import PackedBatch

if TYPE_CHECKING:
    from dpo_dist.reference.make import Setup


def open_engine(config: TensorParallelConfig, setup: Setup) -> TensorParallelReference:
    return TensorParallelReference(setup.folder.base, setup.dtype, setup.attention, setup.world,
                                   config.tensor_parallel_size)


class TensorParallelReference(ReferenceEngine):
    """A team of ranks forwards its members' packs in turn, each pack split over the team; each member keeps its own
    values.

    Callers see a data-parallel engine: a pack for each rank. The output head is whole on every rank, which applies it
    to its own pack alone: the head's work is divided without being sharded.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str, world: World, size: int | None):
        prepare_deepspeed(world.device)
        # uses the process group that World made
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        config = read_config(folder)
        if has_other_parts(config):
            raise UserError(f"reference.engine=tensor_parallel cannot split {folder}, a {config.model_type} that also "
                            "sees images; set reference=zero")
        size = _team_size(size, world, config)
        self._team = world.team(size)
        if size > 1:
            _check_split(config, self._team, world.device, attention)
        # In the files' own dtype the weights are mapped, not read: a rank reads its slices only, and no node holds
        # whole copies.
        self._model = ScoredModel(load_causal_lm(folder, stored_dtype(folder), attention), attention)
        self._model.eval().requires_grad_(False)
        _split(self._model.lm, self._team, world.device)
        for parameter in self._model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self._device = world.device

    def token_logps(self, batch: PackedBatch) -> Tensor:
        with torch.no_grad():
            for member, pack in enumerate(self._team.gather(batch)):
                hidden = self._model.hidden(pack.to(self._device))
                if member == self._team.rank:
                    own = hidden
            return self._model.head(own, batch.targets.to(self._device))[0]

    def close(self) -> None:
        del self._model
        release_memory(self._device)


def _team_size(size: int | None, world: World, config: Any) -> int:
    """Ranks of a team: as asked, or all of a node. UserError where processes or heads cannot be divided so."""
    size = size or world.local_size
    smallest = min(world.gather(world.local_size))
    if smallest % size:
        raise UserError(f"reference.tensor_parallel_size={size} does not divide the {smallest} processes of a node; "
                        "set a divisor of it")
    for key in ("num_attention_heads", "num_key_value_heads"):
        if (number := setting(config, key)) and number % size:
            raise UserError(f"reference.tensor_parallel_size={size} does not divide the reference's {number} {key}; "
                            f"set a divisor of {number}, or reference=zero")
    return size


def _split(lm: nn.Module, team: Team, device: torch.device) -> None:
    """Replaces the decoder's linear layers, in place, by this rank's slices. The head, a LogpHead, stays whole."""
    if team.size > 1:
        exact = {name: buffer.clone() for name, buffer in lm.named_buffers()}
        dtype = next(lm.parameters()).dtype
        # Without tp_group nothing is split, silently; without mpu, DeepSpeed takes the whole world for the team.
        mpu = SimpleNamespace(get_model_parallel_group=lambda: team.group)
        teams = {"tp_size": team.size, "tp_group": team.group, "mpu": mpu}
        deepspeed.init_inference(lm, dtype=dtype, replace_with_kernel_inject=False, tensor_parallel=teams)
        # DeepSpeed casts them too, and RoPE's frequencies would be rounded
        for name, buffer in lm.named_buffers():
            buffer.data = exact[name].to(buffer.device)
    lm.to(device)


def _check_split(config: PretrainedConfig, team: Team, device: torch.device, attention: str) -> None:
    """UserError where splitting changes what this architecture computes, or spares little memory.

    Found by trying: a tiny model of the architecture is split and compared with a whole one.
    """
    refused = f"reference.engine=tensor_parallel does not fit this reference, a {config.model_type}: "
    with torch.no_grad():
        whole = tiny_backbone(config, "branch" if attention == "branch" else "eager", team.size)
        split = copy.deepcopy(whole)
        ids = torch.arange(3, 27, device=device)[None]
        wanted = whole.to(device)(input_ids=ids, use_cache=False).last_hidden_state
        try:
            _split(split, team, device)
            found = split(input_ids=ids, use_cache=False).last_hidden_state
            error = (found - wanted).abs().max() / wanted.abs().max()
        except (AssertionError, ValueError, RuntimeError) as problem:
            raise UserError(f"{refused}DeepSpeed cannot split it ({problem}); set reference=zero") from problem
    if not error < 1e-3:
        raise UserError(f"{refused}split by DeepSpeed it computes something else (by {error:.2g}); set reference=zero")
    share = max(team.gather(_matrices(split) / _matrices(whole)))
    if share > (1 + 1 / team.size) / 2:
        raise UserError(f"{refused}DeepSpeed leaves {share:.0%} of its layers' weights on every rank; set "
                        "reference=zero")


def _matrices(lm: Any) -> int:
    """Elements of the weights of a model's layers."""
    return sum(p.numel() for name, p in lm.named_parameters() if "layers." in name and p.ndim >= 2)
