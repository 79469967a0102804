"""<run.dir>/not-finite/step-NNNNNN/: what a step was made of whose loss or gradient was not finite.

    step.json     the step, what was seen, which of its pairs are not finite, the checkpoint to start from, the config,
                  the versions, the ranks. The same command goes on from that checkpoint to the same step.
    pairs.jsonl   the step's pairs as rows of data.train or data.eval (format: token_ids), each with where it stands and
                  the rewards that training saw
"""
from __future__ import annotations

import json
from typing import Any

import numpy as np

from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.store import PairStore
from dpo_dist.run.provenance.made_by import versions
from dpo_dist.run.step_results import NotFinite
from dpo_dist.runtime.files import jsonable, write_atomic, write_json
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.world import World

SHOWN_PAIRS = 3


def write_not_finite(error: NotFinite, run_dir: RunDir, config: RunConfig, pairs: PairStore, pair_ids: np.ndarray,
                     visits: tuple[np.ndarray, np.ndarray], world: World) -> str:
    """Writes the folder; what it shows, for a person. pair_ids: of the step. visits: this rank's pairs of it and their
    (2, B) rewards. All ranks call it."""
    ids, rewards = visits
    seen = {i: (*values, rank) for rank, (some, of) in enumerate(world.gather((ids.tolist(), rewards.T.tolist())))
            for i, values in zip(some, of, strict=True)}
    return world.on_main(lambda: _write(error, run_dir, config, pairs, pair_ids.tolist(), seen, world.size))


def _write(error: NotFinite, run_dir: RunDir, config: RunConfig, pairs: PairStore, pair_ids: list[int],
           seen: dict[int, tuple[float, float, int]], ranks: int) -> str:
    folder = run_dir.not_finite(error.step)
    folder.mkdir(parents=True, exist_ok=True)
    bad = [i for i in pair_ids if i in seen and not np.isfinite(seen[i][:2]).all()]
    last = run_dir.newest_checkpoint()
    write_atomic(folder / "pairs.jsonl", "".join(json.dumps(_row(i, pairs, seen.get(i))) + "\n" for i in pair_ids))
    write_json(folder / "step.json", {
        "step": error.step, "what": error.what, "learning_rate": error.lr, "grad_norm": jsonable(error.grad_norm),
        "pairs": pair_ids, "pairs_not_finite": [{"pair": i, "where": pairs[i].where} for i in bad],
        "state": {"checkpoint": last.name if last else None, "model": config.model.path}, "ranks": ranks,
        "versions": versions(), "config": to_dict(config)})
    where = ", ".join(pairs[i].where for i in bad[:SHOWN_PAIRS])
    found = (f"{len(bad)} of its {len(pair_ids)} pairs are not finite themselves ({where})" if bad
             else f"none of its {len(pair_ids)} pairs shows why" if seen else f"it has {len(pair_ids)} pairs")
    start = f"from {last.name}" if last else "from the beginning"
    return f"{found}; they are in {folder}, and the same command comes to this step again {start}"


def _row(i: int, pairs: PairStore, seen: tuple[float, float, int] | None) -> dict[str, Any]:
    pair = pairs[i]
    chosen, rejected, rank = seen or (None, None, None)
    masks = {name: [int(one) for one in mask] for name, mask in (("chosen_counts", pair.chosen_counts),
                                                                 ("rejected_counts", pair.rejected_counts))
             if mask is not None}
    return {"pair": i, "where": pair.where, "rank": rank, "reward_chosen": jsonable(chosen),
            "reward_rejected": jsonable(rejected), "weight": pair.weight, "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids), "rejected_ids": list(pair.rejected_ids), **masks}
