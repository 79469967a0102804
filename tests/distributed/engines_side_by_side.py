"""Run on several ranks: every reference engine scores this rank's packs, and rank 0 prints how far each is from the
plain forward."""
from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path

import torch

from dpo_dist.config.compose import compose
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.logps import plain_token_logps
from dpo_dist.models.load import load_causal_lm
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.reference.make import Setup, make_reference
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World

PACKS = 3


def trees_of(rank: int, pack: int) -> list[Sequences]:
    """Uneven work: other prompts, branches and lengths on every rank; the last pack is the same everywhere, as a filler
    is."""
    r = random.Random(0 if pack == PACKS - 1 else 100 * rank + pack + 1)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(r.randrange(3, 64) for _ in range(r.randint(1, longest)))

    return [Sequences(ids(20), tuple(ids(16) for _ in range(r.randint(1, 4)))) for _ in range(r.randint(1, 4))]


def plain(folder: Path, trees: list[Sequences]) -> torch.Tensor:
    model = load_causal_lm(folder, torch.float32, "padded").eval()
    with torch.no_grad():
        return torch.cat([plain_token_logps(model, torch.tensor(t.prompt), torch.tensor(c)) for t in trees
                          for c in t.completions])


def main(models: list[str]) -> None:
    cluster = compose(["model.path=unused", "cluster.device=cpu", "cluster.timeout_seconds=60"]).cluster
    world = World.start(cluster)
    # what is imported by now need not be looked through at every close()
    gc.freeze()
    engines = [("hf", "none", None), ("hf", "disk", None), ("zero", "none", None)]
    engines += [("tensor_parallel", "none", size) for size in (1, 2, 4) if world.size % size == 0]
    work = [trees_of(world.rank, pack) for pack in range(PACKS)]
    for folder in map(Path, models):
        wanted = [plain(folder, trees) for trees in work]
        for attention in ("branch", "padded"):
            for engine, offload, size in engines:
                if attention == "padded" and engine == "zero":
                    continue                                     # the same forward as hf's, and slow to set up
                split = [] if size is None else [f"reference.tensor_parallel_size={size}"]
                config = compose(["model.path=unused", f"reference={engine}",
                                  *([] if offload == "none" else [f"reference.offload={offload}"]), *split]).reference
                reference = make_reference(config, Setup(ModelFolder(folder), torch.float32, attention, world))
                held = (sum(p.numel() for name, p in reference._model.named_parameters() if ".layers." in name)
                        if engine == "tensor_parallel" else None)
                got = [reference.token_logps(pack_sequences(trees)) for trees in work]
                reference.close()
                error = world.max(max((g - w).abs().max().item() for g, w in zip(got, wanted, strict=True)))
                if world.is_main:
                    print(json.dumps({"model": folder.name, "engine": engine, "offload": offload, "size": size,
                                      "attention": attention, "held": held, "error": error}), flush=True)
    world.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
    exit_with(0)
