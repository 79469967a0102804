"""A run that is told to end saves, says so, and goes on later as if nothing had happened; a rank that dies ends the job at once."""
from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO, dpo_dist, metrics, processes_on, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

STEPS = 40


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    write_rows(tmp_path / "rows.jsonl", 100, longest=80)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "cluster.procs_per_node=2", "train.pairs_per_step=24",
            f"train.max_steps={STEPS}", "optim.lr=1e-3", "train.tokens_per_microbatch=600"]


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "dpo_dist.launcher.cli", *map(str, words)], cwd=REPO, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def steps_logged(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def rank(n: int, run_dir: Path) -> int:
    """The process id of a rank."""
    return next(pid for pid in processes_on(run_dir) if f"\0RANK={n}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes())


def model_digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_told_to_end_saves_first_and_goes_on_to_the_very_bits(sent: signal.Signals, tmp_path: Path, words: list[str]):
    process = start("run", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    os.killpg(process.pid, sent)                          # as a terminal does it: to the whole foreground group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, err
    marker = json.loads((tmp_path / "run" / "PREEMPTED").read_text())
    assert marker["signal"] == sent and marker["message"] in out
    last = steps_logged(tmp_path / "run")
    assert last < STEPS and f"step {last} of {STEPS} is saved" in out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    assert not (tmp_path / "run" / "FAILED").exists() and not processes_on(tmp_path / "run")

    assert f"resumed from step-{last:06d}" in dpo_dist("run", *words, f"run.dir={tmp_path / 'run'}").stdout
    assert not (tmp_path / "run" / "PREEMPTED").exists() and (tmp_path / "run" / "DONE").exists()
    if sent == signal.SIGINT:
        dpo_dist("run", *words, f"run.dir={tmp_path / 'straight'}")
        assert model_digest(tmp_path / "run") == model_digest(tmp_path / "straight")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, words: list[str]):
    process = start("train", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 1, process)
    os.kill(rank(1, tmp_path / "run"), signal.SIGSTOP)    # so the step never ends
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the first waits for the step"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(5) != 0
    assert not processes_on(tmp_path / "run")


def test_scoring_that_is_told_to_end_keeps_what_is_scored_and_the_training_does_not_start(tmp_path: Path, words: list[str]):
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    write_rows(tmp_path / "rows.jsonl", 2000, longest=100)
    process = start("run", *words, f"run.dir={tmp_path / 'run'}", "train.tokens_per_microbatch=320")
    wait_until(lambda: any((tmp_path / "reference").glob("*/*.safetensors")), process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    kept = int(re.search(r"(\d+) sequences are scored", out)[1])
    assert 0 < kept < 4000 and (tmp_path / "run" / "PREEMPTED").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert f"scored {4000 - kept}, cached {kept}" in dpo_dist("score", *words, f"run.dir={tmp_path / 'run'}").stdout


def test_a_rank_that_dies_ends_the_job_at_once_and_the_last_lines_of_its_log_are_shown(tmp_path: Path, words: list[str]):
    process = start("train", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    with (tmp_path / "run" / "logs" / "rank-1.log").open("a") as log:
        log.write("the last words of rank 1\n")
    os.kill(rank(1, tmp_path / "run"), signal.SIGKILL)
    died = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - died < 10
    assert "the last words of rank 1" in err and "error: rank 1 was ended by SIGKILL" in err
    assert json.loads((tmp_path / "run" / "FAILED").read_text())["message"].startswith("rank 1 was ended")
    assert not processes_on(tmp_path / "run")
