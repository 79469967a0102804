"""Real runs whose files were damaged in between: the same command ends in the very weights of the undisturbed run."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, metrics, model_digest, train_on, write_rows, write_tiny_llama
from damages import cut, flip, garbage

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 40)
    write_rows(tmp_path / "held_out.jsonl", 8, seed=1)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=10", "train.max_steps=4", "optim.lr=5e-3",
            "loss.beta=0.5", "train.eval_every_steps=2", "train.keep_best=rewards/accuracies",
            f"run.dir={tmp_path / 'run'}"]


def test_damaged_tokens_are_tokenized_again_and_give_the_same_weights(tmp_path: Path, words: list[str]) -> None:
    dpo_dist(*words)
    whole = model_digest(tmp_path / "run")
    ids = next((tmp_path / "tokens").glob("*/train/ids.npy"))
    for damages in (flip, cut):
        shutil.rmtree(tmp_path / "run")
        damages(ids)
        said = dpo_dist(*words, "cluster.procs_per_node=2").stdout if damages is cut else dpo_dist(*words).stdout
        assert f"the token cache {ids.parent.parent} was damaged (train/ids.npy" in said
        assert said.count("was damaged") == 1
        if damages is flip:
            assert model_digest(tmp_path / "run") == whole


def test_a_damaged_export_is_told_and_exported_again_from_the_best_checkpoint(tmp_path: Path, words: list[str]) -> None:
    dpo_dist(*words)
    run, whole = tmp_path / "run", model_digest(tmp_path / "run")
    assert "nothing to do" in dpo_dist(*words).stdout
    for name, damages in (("model.safetensors", flip), ("config.json", cut), ("model.safetensors", Path.unlink)):
        damages(run / "model" / name)
        said = dpo_dist(*words).stdout
        assert f"{run / 'model'} is damaged: {name}" in said and "nothing to do" not in said
        assert "it is exported again" in said
        assert model_digest(run) == whole
    assert "nothing to do" in dpo_dist(*words).stdout
    assert dpo_dist("verify", run, code=0).stdout


def test_a_damaged_export_is_not_trained_on(tmp_path: Path, words: list[str]) -> None:
    dpo_dist(*words)
    model = tmp_path / "run" / "model"
    next_words = [word for word in words if not word.startswith(("model.path", "run.dir"))]
    next_words += [f"model.path={model}", f"run.dir={tmp_path / 'next'}"]
    for name, damages in (("model.safetensors", flip), ("config.json", garbage)):
        before = (model / name).read_bytes()
        damages(model / name)
        failed = dpo_dist(*next_words, code=2)
        assert f"model.path={model} is not as it was exported: {name}" in failed.stderr
        assert "CHECKSUMS.json" in failed.stderr and "Traceback" not in failed.stderr
        (model / name).write_bytes(before)
    dpo_dist(*next_words)
    assert "CHECKSUMS.json" in [file.name for file in (tmp_path / "next" / "model").iterdir()]


def test_a_damaged_run_json_and_damaged_rows_do_not_stop_a_run_that_goes_on(tmp_path: Path, words: list[str]) -> None:
    run = tmp_path / "run"
    more = [*words, "train.save_every_steps=2", "train.keep_best=null"]
    dpo_dist(*more)
    whole, data_map = model_digest(run), (run / "datamap.json").read_bytes()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000004")               # as where it was killed in step 3 or 4
    garbage(run / "run.json")
    cut(run / "metrics.jsonl")
    flip(next((run / "visits").glob("steps-000001-*.parquet")))
    said = dpo_dist(*more).stdout
    assert f"{run / 'run.json'} was damaged (" in said and "is written anew" in said
    assert "resumed from step-000002" in said
    assert model_digest(run) == whole and (run / "datamap.json").read_bytes() == data_map
    assert dpo_dist("status", run).stdout.startswith("run ")
    assert [row["step"] for row in metrics(run)][-2:] == [3, 4]
