"""Step 0 stops a run whose log-probs are not what they claim to be, and names the pairs. Faults are planted in running
code."""
from __future__ import annotations

from pathlib import Path

import pytest
from conftest import forked, train_on, write_rows, write_tiny_llama

PLANTS = {
    "completion mask off by one": """
import dpo_dist.data.pack as pack
honest = pack._lay_out
def planted(*args, **kwargs):
    batch = honest(*args, **kwargs)
    return replace(batch, predict_at=(batch.predict_at + 1).clamp(max=batch.n_tokens - 1))
pack._lay_out = planted
""",
    "positions run on instead of restarting": """
import torch
import dpo_dist.data.pack as pack
honest = pack._lay_out
def planted(*args, **kwargs):
    batch = honest(*args, **kwargs)
    return replace(batch, position_ids=torch.arange(batch.n_tokens)[None])
pack._lay_out = planted
""",
    "siblings see each other": """
import dpo_dist.models.load as load
from dpo_dist.types import Span, Tree
honest = load.Forest
def planted(trees):
    return honest([Tree(t.prompt, t.branches[:1]) if len(t.branches) == 1 else
                   Tree(Span(t.prompt.start, t.branches[-2].end), t.branches[-1:]) for t in trees])
load.Forest = planted
""",
    "cached reference of shifted tokens": """
import numpy as np
import dpo_dist.reference.cached as cached
honest = cached.LogpCache.logps
cached.LogpCache.logps = lambda self, prompt, completion: np.roll(honest(self, prompt, completion), 1)
""",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_stops_the_run_and_names_the_pairs(plant: str, tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 12)
    script = ("from dataclasses import replace\n" + PLANTS[plant] +
              "import sys\nfrom dpo_dist.runtime.process import run_entry\n"
              "from dpo_dist.train import train\nsys.exit(run_entry(sys.argv[1:], train))\n")
    words = [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "zero=none",
             "train.pairs_per_step=12", "train.max_steps=2", f"run.dir={tmp_path / 'run'}"]
    process = forked("-c", script, *words)
    out, err = process.communicate(120)
    assert process.returncode == 2, out + err
    assert "stopped at step 0" in err and "rows.jsonl:" in err and "Remedy" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
