"""Some steps of this project in one process, plain torch, one thread; prints a line of JSON: run_ours.py WHAT FOLDER
KIND STEPS.

WHAT: dpo (reference cached), dpo_unshared (the same, each completion with a prompt of its own), sft (both completions
of each pair as separate rows, nothing shared), score (the reference's forward alone). After every step the rate of a
plain matrix product is measured, so that the share of it that a step reaches does not depend on how fast the machine is
at the time.
"""
from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from workload import PAIRS_PER_STEP

from dpo_dist.config.compose import compose
from dpo_dist.data.pack import Sequences, pack_pairs, pack_sequences
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.folder import read_config
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.reference.cache.fill import fill, plan_fill
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.hf import HfReference
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.world import World
from dpo_dist.step import StepBatches, step_batches, train_step

LR = 1e-4


def main(what: str, folder: Path, kind: str, steps: int) -> None:
    torch.set_num_threads(1)
    config = compose([f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", "cluster.device=cpu",
                      f"data.cache_dir={folder / 'tokens'}", "optim.max_grad_norm=1.0",
                      "train.tokens_per_microbatch=1024"])
    world = World.start(config.cluster)
    pairs = prepare(config.data, None, None)[0]
    policy = (SinglePolicy(ScoredModel(load_causal_lm(folder / "model", torch.float32, "branch"), "branch"),
                           config.optim, world.device))
    flops = forward_flops(read_config(folder / "model")).training(frozen_base=False)
    cache = LogpCache(str(folder / "reference"), ReferenceKey("bench", "float32"))
    engine = HfReference(ModelFolder(folder / "model"), torch.float32, "branch", world.device)
    scoring, _ = plan_fill(cache, [pairs], world, 1024)
    fill(scoring, cache, [pairs], engine, world)
    engine.close()
    reference = CachedReference(cache)
    losses, seconds, flops_a_step, rates = [], [], [], []
    per_step = PAIRS_PER_STEP[kind]
    for step in range(steps):
        ids = np.arange(step * per_step, (step + 1) * per_step) % len(pairs)
        began = time.perf_counter()
        if what.startswith("dpo"):
            batches = step_batches(pairs, ids, config.loss, world, config.train.tokens_per_microbatch, flops, reference)
            if what == "dpo_unshared":
                batches = unshared(batches, pairs)
            loss = train_step(policy, reference, batches, config.loss, MetricSums(config.loss, world.device), world,
                              Clock(world)).item()
            policy.step(LR)
            flops_a_step.append(batches.work.flops)
        elif what == "sft":
            loss = _sft_step(policy, [pairs[int(i)] for i in ids])
        else:
            with policy.evaluating():
                whole = pack_pairs([pairs[int(i)] for i in ids], list(range(len(ids))), [1.0] * len(ids))
                loss = float(policy.token_logps(whole).logps.sum())
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
        rates.append(product_rate())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_mib": peak, "flops": flops_a_step,
                      "product_rates": rates}))


def unshared(step: StepBatches, pairs: PairStore) -> StepBatches:
    """The same step with every completion after a prompt of its own."""
    batches = []
    for batch in step.batches:
        rows = [pairs[i] for i in batch.pair_ids]
        alone = pack_sequences([Sequences(p.prompt_ids, (c,)) for p in rows for c in (p.chosen_ids, p.rejected_ids)])
        even = 2 * torch.arange(len(rows))
        batches.append(replace(alone, chosen=even, rejected=even + 1, pair_ids=batch.pair_ids, weight=batch.weight,
                               strength=batch.strength))
    return replace(step, batches=tuple(batches))


def product_rate(n: int = 1024) -> float:
    """FLOPs a second of an (n, n) by (n, n) product in fp32, now."""
    a, b = torch.ones(n, n), torch.ones(n, n)
    began = time.perf_counter()
    for _ in range(3):
        torch.mm(a, b)
    return 3 * 2 * n**3 / (time.perf_counter() - began)


def _sft_step(policy: SinglePolicy, pairs: list) -> float:
    """Supervision on both completions of each pair, each with a prompt of its own: the step that DPO is compared
    with."""
    rows = [Sequences(p.prompt_ids, (c,)) for p in pairs for c in (p.chosen_ids, p.rejected_ids)]
    tokens, total = sum(len(r.completions[0]) for r in rows), 0.0
    for at in range(0, len(rows), 2):
        loss = -policy.token_logps(pack_sequences(rows[at:at + 2])).logps.sum() / tokens
        policy.backward(loss, is_last=at + 2 >= len(rows))
        total += loss.item()
    policy.step(LR)
    return total


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
