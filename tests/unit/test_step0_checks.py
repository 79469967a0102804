"""Step 0 stops a run whose log-probs are not what they claim to be, and names the pairs. Faults are planted in running
code."""
from __future__ import annotations

from pathlib import Path
from textwrap import indent

import pytest
from conftest import forked, train_on, write_rows, write_tiny_llama

from dpo_dist.launcher.ranks import Place
from dpo_dist.runtime.ports import free_port

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


RUN = """
import sys
from dpo_dist.runtime.process import run_entry
from dpo_dist.train import train
sys.exit(run_entry(sys.argv[1:], train))
"""


def words_of(tmp_path: Path, base: list[str], zero: str) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 12)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), f"zero={zero}",
            "train.pairs_per_step=12", "train.max_steps=2", f"run.dir={tmp_path / 'run'}"]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_stops_the_run_and_names_the_pairs(plant: str, tmp_path: Path, base: list[str]):
    process = forked("-c", "from dataclasses import replace\n" + PLANTS[plant] + RUN, *words_of(tmp_path, base, "none"))
    out, err = process.communicate(120)
    assert process.returncode == 2, out + err
    assert "stopped at step 0" in err and "rows.jsonl:" in err and "Remedy" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_fault_that_one_rank_sees_stops_all(tmp_path: Path, base: list[str]):
    plant = indent(PLANTS["positions run on instead of restarting"], "    ")
    script = f"import os\nfrom dataclasses import replace\nif os.environ['RANK'] == '1':{plant}{RUN}"
    words = [*words_of(tmp_path, base, "zero3"), "cluster.procs_per_node=2"]
    place = Place(2, master_port=free_port())
    ranks = [forked("-c", script, *words, **place.environment(rank)) for rank in range(2)]
    said = [rank.communicate(120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    failure = (tmp_path / "run" / "FAILED").read_text()
    assert "the packed forward disagrees" in failure and "2 of 3 checked pairs" in failure, failure
