"""A killed run goes on as if nothing had happened: bit-identical at the same world size, to rounding at another."""
from __future__ import annotations

import fcntl
import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import (
    dpo_dist,
    eval_on,
    kill,
    metrics,
    model_digest,
    processes_on,
    start,
    train_on,
    write_rows,
    write_tiny_llama,
)

pytestmark = pytest.mark.distributed

STEPS = 8


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=128)
    write_rows(tmp_path / "rows.jsonl", 50, longest=80)
    write_rows(tmp_path / "held_out.jsonl", 10, seed=1)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=12", f"train.max_steps={STEPS}",
            "train.save_every_steps=1", "optim.lr=1e-3", "loss.beta=0.5", "optim.weight_decay=0.1",
            "train.tokens_per_microbatch=600"]


def killed_after(step: int, words: list[str], run_dir: Path) -> None:
    """Starts the command and kills all of it, without warning, once the checkpoint of this step or a later one is
    whole."""
    process = start(*words, f"run.dir={run_dir}")
    deadline = time.monotonic() + 120
    while not any(whole.parent.name >= f"step-{step:06d}" for whole in run_dir.glob("checkpoints/step-*/COMPLETE")):
        assert process.poll() is None
        assert time.monotonic() < deadline, "the run ended, or came not so far, before it was killed"
        time.sleep(0.02)
    kill([process.pid, *processes_on(run_dir)])
    process.wait()
    assert not (run_dir / "DONE").exists(), "the kill came midway"


def losses(run_dir: Path) -> dict[int, float]:
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "every step is logged once"
    return {int(row["step"]): row["loss"] for row in rows}


def held_out_table(stdout: str) -> list[list[str]]:
    """[metric, before, after] of each line of the table that a run ends with."""
    lines = stdout.partition("held-out pairs")[2].partition("model:")[0].splitlines()
    return [line.split() for line in lines if "/" in line or line.split()[:1] == ["loss"]]


@pytest.mark.parametrize(("zero", "world", "dtype"), [("zero3", 2, "fp32"), ("none", 1, "fp32"),
                                                      ("zero1", 2, "bf16")])
def test_a_killed_run_resumes_to_the_very_bits_of_an_uninterrupted_one(
        zero: str, world: int, dtype: str, tmp_path: Path, words: list[str]):
    words = [*words, f"zero={zero}", f"cluster.procs_per_node={world}", f"model.dtype={dtype}",
             *(["zero.persistence_threshold=0"] if zero == "zero3" else [])]
    straight = dpo_dist(*words, f"run.dir={tmp_path / 'straight'}")
    killed_after(3, words, tmp_path / "killed")
    done = dpo_dist(*words, f"run.dir={tmp_path / 'killed'}")
    assert "resumed from step-" in done.stdout
    assert held_out_table(done.stdout) == held_out_table(straight.stdout)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")
    assert metrics(tmp_path / "killed", "eval") == metrics(tmp_path / "straight", "eval")


def test_a_checkpoint_without_its_marker_is_not_believed_and_old_ones_are_removed(tmp_path: Path, words: list[str]):
    words = [*words, "zero=none", f"run.dir={tmp_path / 'run'}"]
    dpo_dist(*words)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in sorted(checkpoints.iterdir())] == ["step-000007", "step-000008"]
    (checkpoints / "step-000008" / "COMPLETE").unlink()
    (checkpoints / "step-000008" / "weights.safetensors").write_bytes(b"half")
    before = model_digest(tmp_path / "run")
    assert "resumed from step-000007" in dpo_dist(*words).stdout
    assert model_digest(tmp_path / "run") == before


def test_the_same_command_after_the_end_trains_nothing_more(tmp_path: Path, words: list[str]):
    words = [*words, "zero=none", f"run.dir={tmp_path / 'run'}"]
    dpo_dist(*words)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f"all {STEPS} steps are done" in dpo_dist(*words).stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert (tmp_path / "run" / "DONE").exists()


def test_another_run_in_the_same_folder_and_changed_data_are_refused_with_what_differs(tmp_path: Path,
                                                                                       words: list[str]):
    words = [*words, "zero=none", f"run.dir={tmp_path / 'run'}"]
    dpo_dist(*words)
    shown = dpo_dist(*words, "loss.beta=0.25", code=2).stderr
    assert "holds another run (loss.beta was 0.5, is now 0.25)" in shown and "choose another run.dir" in shown
    assert json.loads((tmp_path / "run" / "FAILED").read_text())["exit_code"] == 2
    settings = tmp_path / "m" / "generation_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "temperature": 0.1}))
    for command in ("train", "export"):
        shown = dpo_dist(command, *words[1:], code=2).stderr
        assert "not as it was when this run began: generation_config.json is another" in shown, command
    settings.write_text(before)
    assert "nothing to do" in dpo_dist(*words).stdout
    write_tiny_llama(tmp_path / "m", seed=1, hidden_size=64, intermediate_size=128)
    assert "holds another run (policy_weights was" in dpo_dist(*words, code=2).stderr
    write_rows(tmp_path / "rows.jsonl", 50, seed=7)
    assert "train_pairs.digest was" in dpo_dist(*words, code=2).stderr


def test_a_run_that_is_being_trained_is_not_trained_by_a_second_process(tmp_path: Path, words: list[str]):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = dpo_dist(*words, "zero=none", f"run.dir={tmp_path / 'run'}", code=2).stderr
    assert "another process is at work there now" in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_lora_resumes_to_the_same_bits_and_the_exported_model_can_be_made_again_and_evaluated(tmp_path: Path,
                                                                                              words: list[str]):
    words = [*words, "cluster.procs_per_node=2", "model.lora.rank=4", "tracking=tensorboard"]
    dpo_dist(*words, f"run.dir={tmp_path / 'straight'}")
    killed_after(3, words, tmp_path / "killed")
    dpo_dist(*words, f"run.dir={tmp_path / 'killed'}")
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")

    shutil.rmtree(tmp_path / "killed" / "model")
    dpo_dist("export", *words[1:], f"run.dir={tmp_path / 'killed'}")
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")
    card = (tmp_path / "straight" / "model" / "README.md").read_text()
    assert "beta=0.5" in card and str(tmp_path / "rows.jsonl") in card and "rewards/accuracies" in card

    dpo_dist("eval", *words[2:], f"model.path={tmp_path / 'straight' / 'model'}", f"reference.path={tmp_path / 'm'}",
             "model.lora.rank=0", f"run.dir={tmp_path / 'eval'}")
    again = json.loads((tmp_path / "eval" / "eval.json").read_text())
    last = metrics(tmp_path / "straight", "eval")[-1]
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert again[name] == pytest.approx(last[name], rel=1e-4, abs=1e-4)


def test_an_evaluation_that_a_kill_cut_off_is_made_when_the_run_goes_on(tmp_path: Path, words: list[str]):
    run_dir = tmp_path / "run"
    words = [*words, "zero=none", "train.max_steps=2", "train.log_every_steps=2", f"run.dir={run_dir}"]
    dpo_dist(*words)
    rows, before = (run_dir / "metrics.jsonl").read_text().splitlines(), metrics(run_dir, "eval")
    assert [row["step"] for row in before] == [0, 2] and json.loads(rows[-1])["split"] == "eval"
    # killed between saving step 2 and evaluating
    (run_dir / "metrics.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "model")
    out = dpo_dist(*words).stdout
    assert "resumed from step-000002" in out and metrics(run_dir, "eval") == before and (run_dir / "DONE").exists()


def test_the_table_of_a_resumed_run_says_what_was_before_training(tmp_path: Path, words: list[str]):
    run_dir = tmp_path / "run"
    words = [*words, "zero=none", "train.max_steps=2", f"run.dir={run_dir}"]
    whole = held_out_table(dpo_dist(*words).stdout)
    assert len(whole) > 5 and all(before != "-" for _, before, _ in whole)
    metrics_file = run_dir / "metrics.jsonl"
    first_eval, *later = metrics_file.read_text().splitlines()
    assert json.loads(first_eval)["step"] == 0

    metrics_file.write_text("\n".join([*later, ""]))
    shutil.rmtree(run_dir / "model")                         # so that it resumes at the end
    resumed = dpo_dist(*words).stdout
    assert held_out_table(resumed) == whole, "the checkpoint says it"
    assert "metrics.jsonl was damaged" in resumed and metrics_file.read_text().startswith(first_eval)


def test_logged_means_go_on_over_a_kill(tmp_path: Path, words: list[str]):
    words = [*words, "zero=none", f"train.log_every_steps={STEPS}"]
    dpo_dist(*words, f"run.dir={tmp_path / 'straight'}")
    killed_after(3, words, tmp_path / "killed")
    dpo_dist(*words, f"run.dir={tmp_path / 'killed'}")
    (straight,), (killed,) = metrics(tmp_path / "straight"), metrics(tmp_path / "killed")
    assert ({k: v for k, v in straight.items() if not k.startswith("perf/")}
            == {k: v for k, v in killed.items() if not k.startswith("perf/")})
