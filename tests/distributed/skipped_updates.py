"""Run on two ranks by test_policy.py: an update that is to be skipped changes nothing, in every stage and dtype."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.folder import read_config
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy import Policy
from dpo_dist.policy.make import make_policy
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.step import step_batches, train_step


def weights(policy: Policy) -> torch.Tensor:
    """All of them, as they would be exported: whole on rank 0, empty elsewhere."""
    return torch.cat([tensor.float().flatten() for _, tensor in policy.export_weights()])


def main(model: str, rows: str, cache: str) -> int:
    for stage, dtype in (("0", "fp32"), ("1", "fp32"), ("2", "fp32"), ("3", "fp32"), ("1", "bf16"), ("2", "bf16"),
                         ("3", "bf16")):
        config = compose([f"model.path={model}", f"data.train=[{{path: {rows}, format: token_ids}}]",
                          f"zero.stage={stage}", "loss=simpo", f"model.dtype={dtype}", "cluster.device=cpu",
                          f"data.cache_dir={cache}", "model.gradient_checkpointing=false",
                          *(["zero.persistence_threshold=0"] if stage == "3" else [])])
        world = World.start(config.cluster)
        pairs = world.on_main(lambda config=config: prepare(config.data, None, None)[0])
        policy = make_policy(config, ModelFolder(Path(model)), "branch", world)
        flops = forward_flops(read_config(Path(model))).training(frozen_base=False)
        batches = step_batches(pairs, np.arange(8), config.loss, world, 400, flops)

        def step(skip: float, policy=policy, config=config, batches=batches, world=world) -> torch.Tensor:
            train_step(policy, None, batches, config.loss, MetricSums(config.loss, world.device), world, Clock(world))
            policy.step(1e-2, skip=torch.tensor(skip))
            return weights(policy)

        before, once, skipped, again = weights(policy), step(0.0), step(1.0), step(0.0)
        assert torch.equal(skipped, once), f"stage {stage}, {dtype}: a skipped update changed a weight"
        if world.is_main:
            assert not torch.equal(once, before)
            assert not torch.equal(again, once), f"stage {stage}, {dtype}: the others changed nothing"
            print(f"stage {stage} {dtype} ok", flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main(*sys.argv[1:]))
