"""export.push_to_hub, against a hub on this machine: the upload itself is huggingface_hub's, for real."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import dpo_dist, forked, train_on, write_rows, write_tiny_llama
from hub_server import TOKEN, Hub, hub

pytestmark = pytest.mark.distributed

# huggingface_hub reads its environment when it is imported, which a forked process has done
ENTRY = """import os, sys
from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = os.environ["HF_ENDPOINT"], True
from importlib import import_module
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.process import run_entry
name, *words = sys.argv[1:]
entry = import_module(f"dpo_dist.{name}")
exit_with(run_entry(words, entry.train if name == "train" else entry._export_command, owns_run=name == "train"))
"""


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 8)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "zero=none", "loss=simpo",
            "train.max_steps=1", f"run.dir={tmp_path / 'run'}"]


def run(server: Hub, entry: str, words: list[str], code: int, token: str = TOKEN) -> str:
    process = forked("-c", ENTRY, entry, *words, "export.push_to_hub=me/model", "run.offline=false",
                     HF_ENDPOINT=server.address, HF_TOKEN=token)
    out, err = process.communicate(120)
    assert process.wait() == code, out + err
    return out + err


def test_the_model_is_uploaded_once_and_an_upload_that_fails_loses_nothing(tmp_path: Path, words: list[str]):
    run_dir = tmp_path / "run"
    with hub() as server:
        server.files = {"model-00001-of-00002.safetensors": b"of an earlier upload", "picture.png": b"of a person"}
        server.refuses = 1
        shown = run(server, "train", words, code=2)
        assert "export.push_to_hub=me/model: the upload failed (403" in shown and "dpo-dist export, uploads" in shown
        assert (run_dir / "model" / "model.safetensors").exists() and not (run_dir / "DONE").exists()
        assert server.visibility == {"me/model": "private"} and server.commits == 0

        shown = run(server, "train", words, code=0)
        assert "nothing to do" in shown and f"on the hub: {server.address}/me/model/commit/" in shown
        assert "uploaded  " + server.address in dpo_dist("status", run_dir).stdout
        model = {str(file.relative_to(run_dir / "model")): file.read_bytes()
                 for file in (run_dir / "model").rglob("*") if file.is_file()}
        assert server.files == {**model, "picture.png": b"of a person"} and server.commits == 1

        assert "uploading" not in run(server, "train", words, code=0), "that very model is there"
        assert "uploading" in run(server, "export", words, code=0) and server.commits == 2
        assert not any(TOKEN in file.read_text() for file in run_dir.rglob("*")
                       if file.is_file() and file.suffix in (".log", ".json", ".txt", ".jsonl", ""))
        assert json.loads((run_dir / "pushed.json").read_text())["repository"] == "me/model"


def test_a_hub_that_will_not_take_the_model_is_found_out_before_anything_is_trained(tmp_path: Path, words: list[str]):
    with hub() as server:
        shown = run(server, "train", words, code=2, token="hf_wrong")
    assert "export.push_to_hub=me/model: the hub does not take it (403" in shown and "hf auth login" in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
