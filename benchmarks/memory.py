"""Peak memory of a DPO training step as the vocabulary grows: memory.py [VOCABULARY ...].

One pack of 8 pairs, each with a prompt of 64 tokens and two completions of 256 (4,096 completion tokens), hidden 256, 4
layers, untied embeddings, fp32, one thread, plain torch, reference log-probs from the cache, 3 steps; every vocabulary
in a process of its own.

Told of each: `peak_mib`, the largest resident set that the kernel reports (ru_maxrss); `state_mib`, 16 bytes a
parameter: weight, gradient and AdamW's two moments, the embedding's and the head's too; `imports_mib`, the resident set
once everything is imported and before there is a model. `step_mib` = peak - state is what the ratio is made of;
`step_without_imports_mib` takes off the imports as well. Gradients may not exist yet at the moment of the peak, so
`step_and_gradients_mib` leaves them in and takes off imports and 12 bytes a parameter: the strictest reading. All of it
again with the eight pairs in two packs, where the second pack's gradients are added to the first's. Results:
benchmarks/results/memory.json.
"""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
VOCABULARIES = (4_096, 16_384, 32_768, 65_536, 131_072)
PAIRS, PROMPT, COMPLETION, STEPS = 8, 64, 256, 3
TOKENS = PAIRS * (PROMPT + 2 * COMPLETION)
MIB = 2**20
COMPARED = ("step_mib", "step_without_imports_mib", "step_and_gradients_mib")


def main(vocabularies: list[int]) -> None:
    """No torch in this process: a child's ru_maxrss begins with what its parent held when it was started."""
    packs = {"one_pack": TOKENS, "two_packs": TOKENS // 2}
    rows = {name: [measure(vocabulary, budget) for vocabulary in vocabularies] for name, budget in packs.items()}
    written = {
        "pairs": PAIRS, "completion_tokens": 2 * PAIRS * COMPLETION, "threads": 1, "dtype": "fp32", "rows": rows,
        "largest over smallest vocabulary": {
            name: {what: round(sizes[-1][what] / sizes[0][what], 3) for what in COMPARED}
            for name, sizes in rows.items()},
    }
    (HERE / "results" / "memory.json").write_text(json.dumps(written, indent=2) + "\n")
    print(json.dumps(written, indent=2))


def measure(vocabulary: int, budget: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        process(folder, "prepare", vocabulary, budget)
        return json.loads(process(folder, "steps", vocabulary, budget).splitlines()[-1])


def process(folder: str, what: str, vocabulary: int, budget: int) -> str:
    done = subprocess.run([sys.executable, __file__, what, folder, str(vocabulary), str(budget)], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"V = {vocabulary} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def prepare(folder: Path, vocabulary: int, budget: int) -> None:
    """Writes model, rows and the reference's log-probs; in a process of its own, so that the steps' peak has none of
    it."""
    import random

    import torch
    from workload import write_model

    from dpo_dist.models.digest import model_digest
    from dpo_dist.models.resolve import ModelFolder
    from dpo_dist.reference.cache.fill import fill, plan_fill
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
    from dpo_dist.reference.hf import HfReference

    write_model(folder / "model", vocabulary)
    r = random.Random(1)
    with (folder / "rows.jsonl").open("w") as f:
        for _ in range(PAIRS):
            ids = {name: [r.randrange(4, vocabulary) for _ in range(n)]
                   for name, n in (("prompt_ids", PROMPT), ("chosen_ids", COMPLETION), ("rejected_ids", COMPLETION))}
            f.write(json.dumps(ids) + "\n")
    _, world, pairs = inputs(folder, budget)
    cache = LogpCache(str(folder / "reference"), ReferenceKey(model_digest(folder / "model"), "float32"))
    engine = HfReference(ModelFolder(folder / "model"), torch.float32, "branch", world.device)
    fill(plan_fill(cache, [pairs], world, budget)[0], cache, [pairs], engine, world)


def steps(folder: Path, vocabulary: int, budget: int) -> None:
    import numpy as np
    import torch

    from dpo_dist.models.cost import forward_flops
    from dpo_dist.models.digest import model_digest
    from dpo_dist.models.folder import read_config
    from dpo_dist.models.load import ScoredModel, load_causal_lm
    from dpo_dist.policy.single import SinglePolicy
    from dpo_dist.reference.cache.fill import open_cache
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
    from dpo_dist.reference.cached import CachedReference
    from dpo_dist.run.metrics import MetricSums
    from dpo_dist.run.perf import Clock
    from dpo_dist.step import step_batches, train_step

    torch.set_num_threads(1)
    config, world, pairs = inputs(folder, budget)
    imports = resident_mib()
    cache = LogpCache(str(folder / "reference"), ReferenceKey(model_digest(folder / "model"), "float32"))
    open_cache(cache, world)
    policy = SinglePolicy(ScoredModel(load_causal_lm(folder / "model", torch.float32, "branch"), "branch"),
                          config.optim, world.device)
    parameters = sum(p.numel() for p in policy.model.parameters())
    flops = forward_flops(read_config(folder / "model")).training(frozen_base=False)
    batches = step_batches(pairs, np.arange(PAIRS), config.loss, world, budget, flops)
    assert len(batches.batches) == TOKENS // budget, "as many packs as the token budget was chosen for"
    for _ in range(STEPS):
        train_step(policy, CachedReference(cache), batches, config.loss, MetricSums(config.loss, world.device), world,
                   Clock(world))
        policy.step(1e-4)
    peak, state = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 16 * parameters / MIB
    row = {"vocabulary": vocabulary, "parameters": parameters, "peak_mib": peak, "state_mib": state,
           "imports_mib": imports, "step_mib": peak - state, "step_without_imports_mib": peak - state - imports,
           "step_and_gradients_mib": peak - 0.75 * state - imports}
    print(json.dumps({name: round(value, 1) for name, value in row.items()}))


def inputs(folder: Path, budget: int):
    from dpo_dist.config.compose import compose
    from dpo_dist.data.prepare import prepare as prepare_pairs
    from dpo_dist.runtime.world import World

    config = compose([f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", "cluster.device=cpu",
                      f"data.cache_dir={folder / 'tokens'}", f"train.tokens_per_microbatch={budget}"])
    return config, World.start(config.cluster), prepare_pairs(config.data, None, None)[0]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


if __name__ == "__main__":
    if sys.argv[1:2] in (["prepare"], ["steps"]):
        work = prepare if sys.argv[1] == "prepare" else steps
        work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main([int(word) for word in sys.argv[1:]] or list(VOCABULARIES))
