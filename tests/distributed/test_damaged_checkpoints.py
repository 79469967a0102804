"""A damaged checkpoint is never believed: the one before is taken, and the run ends in the same weights. A full disk
costs a checkpoint, not the run."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import dpo_dist, metrics, model_digest, small_run
from damages import cut, flip
from test_other_machine import words

pytestmark = pytest.mark.distributed

STEPS = 8
TWO = ["cluster.procs_per_node=2", "zero.persistence_threshold=0", "train.keep_checkpoints=9",
       "train.save_every_steps=2"]


def flip_near_the_end(file: Path) -> None:
    """Flips a bit of a digit in the last row, which is of the last evaluation and stands in no checkpoint."""
    flip(file, max(i for i, letter in enumerate(file.read_bytes()) if chr(letter).isdigit()), bit=1)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(the command, the folder of what it leaves)."""
    folder = tmp_path_factory.mktemp("finished")
    command = words(folder, small_run(folder), *TWO)
    dpo_dist(*command, f"run.dir={folder / 'run'}")
    return command, folder / "run"


def interrupted(finished: Path, run_dir: Path) -> Path:
    """A copy of the run as it was after step 6; its newest checkpoint."""
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:06d}")
    shutil.rmtree(run_dir / "model")
    (run_dir / "DONE").unlink()
    return run_dir / "checkpoints" / "step-000006"


@pytest.mark.parametrize(("name", "damage", "told"), [
    ("optim_states-00001.safetensors", flip, "optim_states-00001.safetensors is not as it was written"),
    ("optim_states-00000.safetensors", cut, "optim_states-00000.safetensors has "),
    ("state.json", cut, "state.json has "),
    ("COMPLETE", empty, "COMPLETE cannot be read"),
    ("weights-00000.safetensors", Path.unlink, "weights-00000.safetensors is missing"),
])
def test_the_checkpoint_before_a_damaged_one_is_taken_and_the_weights_are_the_same(
        name: str, damage: Callable[[Path], None], told: str, tmp_path: Path, finished: tuple[list[str], Path]):
    command, whole = finished
    newest = interrupted(whole, tmp_path / "run")
    damage(newest / name)
    (tmp_path / "run" / "evaluation.json").unlink()
    shown = dpo_dist(*command, f"run.dir={tmp_path / 'run'}").stdout
    assert "evaluation.json was damaged or missing" in shown
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()
    assert f"step-000006 is damaged: {told}" in shown and "resumed from step-000004" in shown
    assert model_digest(tmp_path / "run") == model_digest(whole)
    rows = [[(row["step"], row["loss"]) for row in metrics(folder)] for folder in (tmp_path / "run", whole)]
    assert rows[0] == rows[1]
    assert not (newest / "DAMAGED").exists() and (newest / "COMPLETE").exists(), "the step is saved again"


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_says_which(tmp_path: Path,
                                                                      finished: tuple[list[str], Path]):
    command, whole = finished
    interrupted(whole, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        flip(checkpoint / "optim_states-00000.safetensors")
    for _ in range(2):                                       # those that were set aside are not forgotten
        shown = dpo_dist(*command, f"run.dir={tmp_path / 'run'}", code=2).stderr
        assert "has no checkpoint that is whole" in shown and "checkpoints away" in shown and "Traceback" not in shown
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "away")
    flip(tmp_path / "run" / "checkpoints" / "step-000004" / "optim_states-00000.safetensors")      # back to what it was
    shown = dpo_dist(*command, f"run.dir={tmp_path / 'run'}").stdout
    assert "step-000004 can be read again, and is whole" in shown and "resumed from step-000004" in shown
    assert model_digest(tmp_path / "run") == model_digest(whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    dpo_dist(*command, f"run.dir={tmp_path / 'run'}")
    assert model_digest(tmp_path / "run") == model_digest(whole)


@pytest.mark.parametrize(("name", "damage"), [
    ("suspects.jsonl", flip), ("datamap.json", cut), ("evaluation.json", flip), ("metrics.jsonl", Path.unlink),
    ("metrics.jsonl", flip_near_the_end)])
def test_what_a_finished_run_says_is_made_again_where_it_is_damaged(
        name: str, damage: Callable[[Path], None], tmp_path: Path, finished: tuple[list[str], Path]):
    command, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / name)
    shutil.rmtree(tmp_path / "run" / "visits")                # the checkpoint has them
    shown = dpo_dist(*command, f"run.dir={tmp_path / 'run'}").stdout
    assert (f"{name} was damaged or missing" in shown or f"or {name} was" in shown
            or f"{name} or suspects.jsonl was damaged" in shown
            or f"{name} was {'missing' if damage == Path.unlink else 'damaged'}: " in shown)
    if name == "metrics.jsonl":
        assert [(row["step"], row["loss"]) for row in metrics(tmp_path / "run", "eval")] == [
            (row["step"], row["loss"]) for row in metrics(whole, "eval")]
    else:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert "nothing to do" in dpo_dist(*command, f"run.dir={tmp_path / 'run'}").stdout
    assert model_digest(tmp_path / "run") == model_digest(whole)


def test_a_damaged_best_checkpoint_is_not_exported(tmp_path: Path, finished: tuple[list[str], Path]):
    command, _ = finished
    best = [*command, "train.eval_every_steps=2", "train.keep_best=rewards/accuracies", f"run.dir={tmp_path / 'run'}"]
    shown = dpo_dist(*best).stdout
    step = int(shown.partition("exported: step ")[2].split()[0])
    shutil.rmtree(tmp_path / "run" / "model")
    flip(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "weights-00000.safetensors")
    if step == STEPS:
        assert "resumed from step-000006" in dpo_dist(*best).stdout
    else:
        assert f"step-{step:06d} is damaged" in dpo_dist(*best, code=2).stderr


def test_a_checkpoint_is_the_same_whether_training_waits_for_it_or_not(tmp_path: Path,
                                                                       finished: tuple[list[str], Path]):
    command, whole = finished
    dpo_dist(*command, "train.save_in_background=false", f"run.dir={tmp_path / 'run'}")
    for file in ("weights-00001.safetensors", "optim_states-00001.safetensors"):
        waited, beside = ((folder / "checkpoints" / "step-000004" / file).read_bytes()
                          for folder in (tmp_path / "run", whole))
        assert waited == beside
    assert model_digest(tmp_path / "run") == model_digest(whole)
    told = [row for row in metrics(whole) if "perf/save_gib_per_second" in row]
    assert told and all(row["perf/save_gib"] > 0 for row in told)
    assert any(row.get("perf/save_stall_seconds", 0) > 0 for row in metrics(whole))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, finished: tuple[list[str], Path]):
    """On a disk of 3 MiB three checkpoints do not fit, and none is removed that is to be kept."""
    command, whole = finished
    mounted = tmp_path / "small"
    mounted.mkdir()
    room = sum(file.stat().st_size for file in (whole / "checkpoints" / "step-000002").iterdir())
    size = int(2.5 * room) + (2 << 20)
    train = [sys.executable, "-m", "dpo_dist.launcher.cli", *command, f"run.dir={mounted / 'run'}"]
    script = (f'mount -t tmpfs -o size={size} small {mounted} && "$@"; code=$?; '
              f"ls {mounted}/run/checkpoints > {tmp_path}/kept; cp -r {mounted}/run {tmp_path}/copy; exit $code")
    done = subprocess.run(["unshare", "-m", "bash", "-c", script, "bash", *train], capture_output=True, text=True,
                          timeout=300, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stdout + done.stderr
    assert "is not saved: " in done.stdout and "GiB left, and" in done.stdout
    assert "stays the last checkpoint" in done.stdout
    if done.returncode == 0:
        assert model_digest(tmp_path / "copy") == model_digest(whole)
    else:
        assert done.returncode == 2 and "make room there" in done.stderr
    assert "step-000002" in (tmp_path / "kept").read_text()
