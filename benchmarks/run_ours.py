"""Some steps of this project in one process, plain torch, one thread; prints a line of JSON: run_ours.py WHAT FOLDER KIND STEPS.

WHAT: dpo (reference cached), sft (both completions of each pair as separate rows, nothing shared), score (the reference's forward alone).
"""
from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from workload import PAIRS_PER_STEP

from dpo_dist.compose import compose
from dpo_dist.data.pack import Sequences, pack_pairs, pack_sequences
from dpo_dist.data.store import prepare
from dpo_dist.metrics import MetricSums
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.reference.cache import LogpCache, ReferenceKey
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.fill import fill, plan
from dpo_dist.reference.hf import HfReference
from dpo_dist.step import step_batches, train_step
from dpo_dist.world import World

LR = 1e-4


def main(what: str, folder: Path, kind: str, steps: int) -> None:
    torch.set_num_threads(1)
    config = compose([f"model.path={folder / 'model'}", f"data.train=[{{path: {folder / 'rows.jsonl'}, format: token_ids}}]",
                      "cluster.device=cpu",
                      f"data.cache_dir={folder / 'tokens'}", "optim.max_grad_norm=1.0", "train.tokens_per_microbatch=1024"])
    world = World.start(config.cluster)
    pairs = prepare(config.data, None, None)[0]
    policy = SinglePolicy(ScoredModel(load_causal_lm(folder / "model", torch.float32, "branch"), "branch"), config.optim, world.device)
    cache = LogpCache(str(folder / "reference"), ReferenceKey("bench", "float32"))
    engine = HfReference(folder / "model", torch.float32, "branch", world.device)
    scoring = plan(cache, [pairs], world, 1024)
    fill(scoring, cache, [pairs], engine, world)
    engine.close()
    reference = CachedReference(cache)
    losses, seconds = [], []
    per_step = PAIRS_PER_STEP[kind]
    for step in range(steps):
        ids = np.arange(step * per_step, (step + 1) * per_step) % len(pairs)
        began = time.perf_counter()
        if what == "dpo":
            batches = step_batches(pairs, ids, config.loss, world, config.train.tokens_per_microbatch, 256)
            loss = train_step(policy, reference, batches, config.loss, MetricSums(config.loss, world.device), world).item()
            policy.step(LR)
        elif what == "sft":
            loss = _sft_step(policy, [pairs[int(i)] for i in ids])
        else:
            with policy.evaluating():
                loss = float(sum(policy.token_logps(pack_pairs([pairs[int(i)]], [0], [1.0])).logps.sum() for i in ids))
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_mib": peak}))


def _sft_step(policy: SinglePolicy, pairs: list) -> float:
    """Supervision on both completions of each pair, each with a prompt of its own: the step that DPO is compared with."""
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
