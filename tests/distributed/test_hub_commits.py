"""A branch of the hub that moves moves no run: what was downloaded is recorded, and taken again. The hub is one on this
machine; downloads are huggingface_hub's and datasets', for real."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import forked, write_rows, write_tiny_llama
from hub_repositories import Hub, hub

pytestmark = pytest.mark.distributed

# the libraries read their environment when they are imported, which a forked process has done
ENTRY = """import os, sys
from pathlib import Path
from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_CACHE = os.environ["HF_ENDPOINT"], os.environ["HF_HUB_CACHE"]
constants.HF_HUB_DISABLE_XET = True
import datasets
datasets.config.HF_ENDPOINT = constants.ENDPOINT
datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_HUB_CACHE"]) / "sets"
datasets.config.HF_HUB_OFFLINE = "run.offline=false" not in sys.argv
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.process import run_entry
from dpo_dist.train import train
exit_with(run_entry(sys.argv[1:], train, owns_run=True))
"""


def run(server: Hub, tmp_path: Path, words: list[str], code: int = 0) -> str:
    process = forked("-c", ENTRY, *words, HF_ENDPOINT=server.address, HF_HUB_CACHE=str(tmp_path / "cache"))
    out, err = process.communicate(120)
    assert process.wait() == code, out + err
    return out + err


def undo_the_last_step(run_dir: Path) -> None:
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoints" / "step-000002")


def test_a_run_goes_on_with_the_commits_that_it_began_with(tmp_path: Path, base: list[str]):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "rows.jsonl", 8)
    words = ["model.path=me/model", "data.train=[{path: me/set, format: token_ids}]", *base, "zero=none", "loss=simpo",
             "train.max_steps=2", "train.pairs_per_step=4", "train.save_every_steps=1"]
    with hub() as server:
        first = {"me/model": server.commit("models/me/model", write_tiny_llama(tmp_path / "m", seed=0)),
                 "datasets/me/set": server.commit("datasets/me/set", tmp_path / "set")}
        run(server, tmp_path, [*words, f"run.dir={tmp_path / 'run'}", "run.offline=false"])
        assert json.loads((tmp_path / "run" / "run.json").read_text())["passport"]["hub"] == first

        write_rows(tmp_path / "set" / "rows.jsonl", 8, seed=1)
        moved = {"me/model": server.commit("models/me/model", write_tiny_llama(tmp_path / "m", seed=1)),
                 "datasets/me/set": server.commit("datasets/me/set", tmp_path / "set")}
        undo_the_last_step(tmp_path / "run")
        run(server, tmp_path, [*words, f"run.dir={tmp_path / 'run'}", "run.offline=false"])
        assert json.loads((tmp_path / "run" / "run.json").read_text())["passport"]["hub"] == first
        run(server, tmp_path, [*words, f"run.dir={tmp_path / 'other'}", "run.offline=false"])
        assert json.loads((tmp_path / "other" / "run.json").read_text())["passport"]["hub"] == moved

        # without a network `datasets` takes the newest that it has, which is not the run's
        undo_the_last_step(tmp_path / "run")
        told = run(server, tmp_path, [*words, f"run.dir={tmp_path / 'run'}"], code=2)
        assert f"'me/set' was commit {first['datasets/me/set']} when this run began" in told
        shutil.rmtree(tmp_path / "cache" / "models--me--model" / "snapshots" / first["me/model"])
        told = run(server, tmp_path, [*words, f"run.dir={tmp_path / 'run'}"], code=2)
        assert f"model.path=me/model was commit {first['me/model']} when this run began" in told
        assert "run.offline=false" in told
