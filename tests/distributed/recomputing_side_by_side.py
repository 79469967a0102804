"""Run on two ranks: gradients under ZeRO-3 with nothing kept whole, for each way to recompute, against one process that
keeps everything.

Every weight is sharded and let go of at once (no persistent, live or reused parameters), so that what backward computes
again finds its weights released, as in a model that is larger than a GPU.
"""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from plain_kernels import PLAIN

import dpo_dist.policy.zero
from dpo_dist.config.compose import compose
from dpo_dist.config.schema import OptimConfig
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.models.checkpointing import checkpoint_layers
from dpo_dist.models.fused import fuse
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.models.lora import add_lora
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.policy.zero import ZeroPolicy
from dpo_dist.policy.zero_config import deepspeed_config
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch

HOWS: list[bool | int] = [False, True, 0, 1]
PACKS = 2


def packs_of(rank: int) -> list[PackedBatch]:
    generator = torch.Generator().manual_seed(rank)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 60, (n,), generator=generator).tolist())

    return [pack_sequences([Sequences(ids(9 + rank), (ids(7), ids(4 + 3 * k)))] * 2) for k in range(PACKS)]


def release_at_once(*args: Any) -> dict[str, Any]:
    config = deepspeed_config(*args)
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                                        "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    return config


def gradients(policy: Any, packs: list[PackedBatch], full: Any) -> dict[str, torch.Tensor]:
    """Of two steps' micro-steps each; the second step is another one, as DeepSpeed records the order of modules in the
    first."""
    for _ in range(2):
        for k, pack in enumerate(packs):
            policy.backward((policy.token_logps(pack).logps.sum() ** 2) * 1e-3, k == len(packs) - 1)
        out = {name: full(p) for name, p in policy.model.named_parameters() if p.requires_grad}
        policy.step(0.0)
    with policy.evaluating():
        policy.token_logps(packs[0])
    return out


def errors(folder: Path, rank: int, fused: bool, optim: OptimConfig, world: World) -> list[tuple[bool | int, float]]:
    """(how, the largest error of a parameter's gradient over its norm) of each, with LoRA adapters of that rank (0:
    none)."""
    defaults = compose(["model.path=unused", "zero=zero3"])
    lora = replace(defaults.model.lora, rank=rank)

    def load(how: bool | int) -> ScoredModel:
        lm = load_causal_lm(folder, torch.float32, "branch")
        if fused:
            assert len(fuse(lm, PLAIN)) == 3
        model = ScoredModel(add_lora(lm, lora, 0) if rank else lm, "branch")
        checkpoint_layers(model, how)
        return model

    everyones = [pack for r in range(world.size) for pack in packs_of(r)]
    alone = gradients(SinglePolicy(load(False), optim, world.device), everyones, lambda p: p.grad.clone())
    out = []
    for how in HOWS:
        policy = ZeroPolicy(lambda how=how: load(how), defaults.zero, optim, torch.float32, world)
        got = gradients(policy, packs_of(world.rank), safe_get_full_grad)
        assert not any(p.numel() for p in policy.model.parameters()), "a weight stayed whole"
        out.append((how, max(((got[name] - g).norm() / g.norm().clamp_min(1e-12)).item() for name, g in alone.items())))
        policy._engine.destroy()
    return out


def main(folders: list[str]) -> None:
    dpo_dist.policy.zero.deepspeed_config = release_at_once
    cluster = compose(["model.path=unused", "cluster.device=cpu", "cluster.timeout_seconds=60"]).cluster
    world = World.start(cluster)
    optim = replace(compose(["model.path=unused"]).optim, max_grad_norm=None)
    for folder in map(Path, folders):
        for rank, fused in ((0, False), (4, False), (0, True)):
            for how, error in errors(folder, rank, fused, optim, world):
                if world.is_main:
                    print(json.dumps({"model": folder.name, "lora": rank, "fused": fused, "how": how, "error": error}),
                          flush=True)
    world.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
    exit_with(0)
