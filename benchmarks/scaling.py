"""How planning, balance and the cost of a step grow: scaling.py [planning] [balance] [measured] [steps]; all of them by
default.

planning  The training plan of 1,000,000 pairs (the shuffled epoch, then every step of 64 pairs laid out for 8 ranks)
and the scoring plan of
          the same pairs with an empty cache, each in a process of its own, one thread. Seconds; and how far the largest
          resident set rose above what was resident before (the pairs' lengths, contents and tokens, which training has
          mapped from disk), by pair.
balance   64 pairs a step, prompt and both completions of 8 to 2,048 tokens each, at most 8,192 tokens a pack, 2 and 8
ranks, 200 draws of
          each distribution, FLOPs of an 8B Llama. `busiest`: the busiest rank's planned cost over the mean rank's.
          `waiting`: a step in which ranks wait for each other at every micro-step (ZeRO-3) over the mean rank's cost.
          `one_pair_too_large`: the share of draws in which one pair alone costs more than 1.05 times a rank's mean,
          which no plan can balance.
measured  The same lengths really computed on by 2 processes of one thread under torchrun, fp32: each forwards and
backwards its packs of the
          step as training does (train_step; SimPO, whose cost is DPO's without a reference to be known), but with a
          model of its own, so that no process waits for the other inside forward or backward. They begin every step
          together. Busiest over mean, in seconds and in seconds of the processor (what others do on the machine does
          not add to those), and what was planned. The first step, which warms up, is left out.
steps     Seconds of a real step under ZeRO-1 (forward, backward, wait and update) as its pairs grow from 4 to 64, as
its sequences grow
          from 128 to 2,048 tokens (prompt and completions are half of each), and from 1 to 2 ranks. The fastest of 8
          steps after the first: what others do on the machine only ever adds to it.

The measured parts train a Llama of hidden 128, 2 layers. Results: benchmarks/results/scaling.json; a part replaces what
it measured before.
"""
from __future__ import annotations

import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_dist.config.compose import compose
from dpo_dist.data.packing import plan_step
from dpo_dist.data.prepare import prepare
from dpo_dist.data.sampler import PairSampler, Shuffle
from dpo_dist.data.units import PairShapes
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.reference.cache.scoring_plan import plan_scoring
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.world import World
from dpo_dist.step import step_batches, train_step

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SHORTEST, LONGEST, PAIRS_PER_STEP, BUDGET = 8, 2048, 64, 8192
SMALL = LlamaConfig(vocab_size=1024, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=2,
                    eos_token_id=1, pad_token_id=0)
LARGE = LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                    num_attention_heads=32,
                    # the shape of Llama 3.1 8B
                    num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False)
LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda r, n: r.integers(SHORTEST, LONGEST + 1, (n, 3)),
    "log-uniform": lambda r, n: np.exp(r.uniform(math.log(SHORTEST), math.log(LONGEST), (n, 3))).astype(np.int64),
    "log-normal": lambda r, n: np.clip(r.lognormal(5, 1.2, (n, 3)), SHORTEST, LONGEST).astype(np.int64),
}


def main(parts: list[str]) -> None:
    measure = {"planning": planning, "balance": balance, "measured": measured, "steps": steps}
    for part in parts or list(measure):
        found = measure[part]()
        print(part, json.dumps(found, indent=2), flush=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, part: found}, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- planning


class DrawnPairs:
    """n pairs whose tokens are cut from one pool, so that they take no memory of their own. Every other prompt occurs
    twice."""

    def __init__(self, n: int):
        r = np.random.default_rng(0)
        self._lengths = np.clip(r.lognormal((4.6, 5.0, 5.0), 0.8, (n, 3)), SHORTEST, LONGEST).astype(np.int32)
        self._pool = r.integers(4, 1000, 2_000_000, dtype=np.int32)
        self._at = r.integers(0, len(self._pool) - LONGEST, (n, 3))
        self._lengths[1::4, 0], self._at[1::4, 0] = self._lengths[::4, 0], self._at[::4, 0]
        self.content = (self._at * 4096 + self._lengths).astype(np.uint64)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> np.ndarray:
        return self._lengths

    def parts(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        (a, b, c), (p, q, r) = self._at[index].tolist(), self._lengths[index].tolist()
        return self._pool[a:a + p], self._pool[b:b + q], self._pool[c:c + r]


def planning(n: int = 1_000_000) -> dict[str, Any]:
    return {"pairs": n, "training, 8 ranks": in_own_process(plan_training, n),
            "scoring": in_own_process(plan_all_scoring, n)}


def in_own_process(work: Callable[[int], dict[str, Any]], n: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, n).result()


def plan_training(n: int) -> dict[str, Any]:
    pairs, flops = DrawnPairs(n), forward_flops(LARGE).training(frozen_base=False)
    sources = np.zeros(n, np.uint16)
    before, began = resident_bytes(), time.perf_counter()
    order = PairSampler(Shuffle(0, "benchmark", sources, (1.0,)), PAIRS_PER_STEP)
    order.pairs_of_step(1, 1, None)
    shuffled = time.perf_counter() - began
    of_each, packs = [], 0
    for step in range(1, order.total_steps(1, None) + 1):
        start = time.perf_counter()
        ids = order.pairs_of_step(step, 1, None)
        packs += len(plan_step(PairShapes(pairs.lengths()[ids], pairs.content[ids]), flops, 8, BUDGET).packs)
        of_each.append(time.perf_counter() - start)
    return {"seconds": round(time.perf_counter() - began, 2), "seconds_of_the_shuffle": round(shuffled, 3),
            "milliseconds_a_step": {"median": round(1000 * statistics.median(of_each), 2),
                                    "worst": round(1000 * max(of_each), 2)}, "micro_steps": packs,
            "bytes_a_pair": round((peak_bytes() - before) / n, 1)}


def plan_all_scoring(n: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        pairs, cache = DrawnPairs(n), LogpCache(folder, ReferenceKey("benchmark", "float32"))
        before, began = resident_bytes(), time.perf_counter()
        plan = plan_scoring(cache, [pairs], BUDGET)
        seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "sequences": len(plan.sequences), "packs": plan.n_packs,
            "bytes_a_pair": round((peak_bytes() - before) / n, 1)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------------------- balance


def balance(draws: int = 200) -> dict[str, Any]:
    flops = forward_flops(LARGE).training(frozen_base=False)
    return {how: {f"{ranks} ranks": planned_balance(how, ranks, flops, draws) for ranks in (2, 8)} for how in LENGTHS}


def planned_balance(how: str, ranks: int, flops: Any, draws: int) -> dict[str, Any]:
    r = np.random.default_rng(7)
    busiest, waiting, too_large = [], [], 0
    for _ in range(draws):
        shapes = unshared(LENGTHS[how](r, PAIRS_PER_STEP))
        plan = plan_step(shapes, flops, ranks, BUDGET)
        mean = sum(map(sum, plan.costs)) / ranks
        prompt, completions = flops.of_pairs(shapes.lengths)
        busiest.append(plan.imbalance)
        waiting.append(plan.makespan / mean)
        too_large += bool((prompt + completions.sum(1)).max() > 1.05 * mean)
    return {"busiest": spread(busiest), "waiting": spread(waiting), "one_pair_too_large": too_large / draws}


def unshared(lengths: np.ndarray) -> PairShapes:
    return PairShapes(lengths.astype(np.int32), np.arange(lengths.size, dtype=np.uint64).reshape(lengths.shape))


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4), "95th percentile": round(float(np.quantile(values, 0.95)), 4),
        "worst": round(max(values), 4)}


# -------------------------------------------------------------------------------------------------------- real training


def measured(n_steps: int = 5) -> dict[str, Any]:
    found = {}
    for how, lengths in LENGTHS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_inputs(folder, lengths(np.random.default_rng(11), n_steps * PAIRS_PER_STEP))
            torchrun(2, [__file__, "--own-packs", name])
            of_steps = json.loads((folder / "seconds.json").read_text())[1:]
        found[how] = {"planned": [round(step["planned"], 3) for step in of_steps],
                      "seconds_a_step": round(statistics.median(max(step["seconds"]) for step in of_steps), 2),
                      **{f"measured, {what}": spread([max(step[what]) / statistics.mean(step[what])
                                                      for step in of_steps])
                         for what in ("seconds", "processor_seconds")}}
    return found


def own_packs(folder: Path) -> None:
    """One of the processes of `measured`; the first writes every step's seconds on each, and the planner's busiest over
    mean rank."""
    torch.set_num_threads(1)
    config = compose([*overrides(folder, PAIRS_PER_STEP), "loss=simpo"])
    world, pairs = World.start(config.cluster), prepare(config.data, None, None)[0]
    policy = SinglePolicy(ScoredModel(load_causal_lm(folder / "model", torch.float32, "branch"), "branch"),
                          config.optim, world.device)
    order = PairSampler(Shuffle(0, pairs.digest, pairs.source, pairs.source_weights), PAIRS_PER_STEP)
    flops, found = forward_flops(SMALL).training(frozen_base=False), []
    for step in range(1, order.total_steps(1, None) + 1):
        ids = order.pairs_of_step(step, 1, None)
        batches = step_batches(pairs, ids, config.loss, world, BUDGET, flops)
        world.barrier()
        began, began_computing = time.perf_counter(), time.process_time()
        train_step(policy, None, batches, config.loss, MetricSums(config.loss, world.device), world, Clock(world))
        mine = time.perf_counter() - began, time.process_time() - began_computing
        seconds, computing_seconds = zip(*world.gather(mine), strict=True)
        policy.step(0.0)
        planned = plan_step(pairs.shapes(ids), flops, world.size, BUDGET).imbalance
        found.append({"seconds": seconds, "processor_seconds": computing_seconds, "planned": planned})
    if world.is_main:
        (folder / "seconds.json").write_text(json.dumps(found))


def steps() -> dict[str, Any]:
    def cost(pairs: int, length: int, ranks: int) -> dict[str, Any]:
        """Of steps of `pairs` pairs whose two sequences have `length` tokens each, half of them the prompt."""
        with tempfile.TemporaryDirectory() as folder:
            rows = train(Path(folder), np.full((9 * pairs, 3), length // 2), pairs, ranks)
        seconds = min(map(computing, rows[1:]))
        return {"pairs": pairs, "sequence_tokens": length, "ranks": ranks, "seconds_a_step": round(seconds, 3),
                "milliseconds_a_pair": round(1000 * seconds / pairs, 2),
                "microseconds_a_token": round(1e6 * seconds / (pairs * 3 * (length // 2)), 2)}

    return {"pairs": [cost(n, 256, 1) for n in (4, 8, 16, 32, 64)],
            "lengths": [cost(8, n, 1) for n in (128, 256, 512, 1024, 2048)],
            "ranks": [cost(32, 512, n) for n in (1, 2)]}


def computing(row: dict[str, float]) -> float:
    return sum(row[f"perf/{part}_seconds"] for part in ("forward", "backward", "wait", "step"))


def train(folder: Path, lengths: np.ndarray, pairs_per_step: int, ranks: int) -> list[dict[str, float]]:
    """One epoch over random pairs of these lengths (n, 3), by the real command; the rows of metrics.jsonl."""
    write_inputs(folder, lengths)
    torchrun(ranks, ["-m", "dpo_dist.train", *overrides(folder, pairs_per_step), f"run.dir={folder / 'run'}"])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def write_inputs(folder: Path, lengths: np.ndarray) -> None:
    r = random.Random(0)
    with (folder / "rows.jsonl").open("w") as f:
        for row in lengths.tolist():
            ids = ([r.randrange(4, SMALL.vocab_size) for _ in range(n)] for n in row)
            f.write(json.dumps(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))) + "\n")
    LlamaForCausalLM(SMALL).save_pretrained(folder / "model")


def torchrun(ranks: int, words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(ranks), *words],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                               "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"torchrun failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def overrides(folder: Path, pairs_per_step: int) -> list[str]:
    return [f"model.path={folder / 'model'}", f"data.train=[{{path: {folder / 'rows.jsonl'}, format: token_ids}}]",
            "data.max_length=8192", "cluster.device=cpu", "model.dtype=fp32", "zero=zero1",
            f"data.cache_dir={folder / 'tokens'}", f"reference.cache_dir={folder / 'reference'}",
            f"train.pairs_per_step={pairs_per_step}", f"train.tokens_per_microbatch={BUDGET}"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--own-packs"]:
        own_packs(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
