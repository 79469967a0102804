"""A signal at a bad moment, while inputs are read, a served reference is silent, held-out pairs are measured or answers
are generated: the run ends soon, keeps what is done, and goes on to the very bits."""
from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import (
    dpo_dist,
    eval_on,
    metrics,
    model_digest,
    process_of_rank,
    processes_on,
    start,
    steps_logged,
    train_on,
    wait_until,
    write_rows,
    write_tiny_llama,
)
from log_prob_server import Answer, LogProbServer
from template import Started

pytestmark = pytest.mark.distributed

SECONDS = 10                                            # from the signal to the end, on a busy machine


def ended(process: Started, run_dir: Path) -> str:
    """What PREEMPTED says of a run that was sent TERM and ended soon, in good order."""
    sent = time.monotonic()
    _, err = process.communicate(60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert time.monotonic() - sent < SECONDS and not processes_on(run_dir) and not (run_dir / "FAILED").exists()
    return json.loads((run_dir / "PREEMPTED").read_text())["message"]


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 40)
    write_rows(tmp_path / "held.jsonl", 20, seed=1)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), eval_on(tmp_path / "held.jsonl"),
            "cluster.procs_per_node=2", "train.pairs_per_step=8", "optim.lr=1e-3"]


def test_a_signal_while_a_file_of_the_model_is_read_ends_every_rank_at_once(tmp_path: Path, words: list[str]):
    os.mkfifo(slow := tmp_path / "m" / "another.safetensors")               # rank 0 waits for its first byte
    process, writers = start("train", *words, f"run.dir={tmp_path / 'run'}"), []

    def is_read() -> list[int]:
        with suppress(OSError):                                             # nobody reads yet
            writers.append(os.open(slow, os.O_WRONLY | os.O_NONBLOCK))
        return writers

    wait_until(is_read, process)
    os.kill(process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM: no work that was under way is lost" in ended(process, tmp_path / "run")
    os.close(writers[0])


class Silent:
    """Makes a server's answers wait from when `begins` is true; `asked` once one does."""

    def __init__(self, server: LogProbServer, begins: Callable[[], bool]):
        self.begins, self.asked, self.ended = begins, threading.Event(), threading.Event()
        server.fault = self.fault

    def fault(self, n: int, answer: Answer) -> Answer:
        if not self.ended.is_set() and self.begins():
            self.asked.set()
            self.ended.wait()
        return answer


@pytest.fixture
def server(tmp_path: Path, words: list[str]) -> Iterator[LogProbServer]:
    with LogProbServer(tmp_path / "m") as running:
        words += ["reference=vllm", "reference.mode=live", f"reference.urls=[{running.url}]",
                  "reference.audit.pairs=4", "reference.requests.wait_seconds=50", "train.eval_every_steps=5",
                  "train.max_steps=7", "zero=zero2", "train.log_every_steps=1"]
        yield running


def test_a_live_reference_that_is_silent_never_keeps_a_run_from_ending(tmp_path: Path, words: list[str],
                                                                       server: LogProbServer):
    run = tmp_path / "run"
    # with the audit, before anything is computed; in a step; in the evaluation after step 5
    for logged in (0, 1, 5):
        silent = Silent(server, lambda logged=logged: steps_logged(run) >= logged)
        process = start("train", *words, f"run.dir={run}")
        wait_until(silent.asked.is_set, process)
        time.sleep(0.5)
        os.kill(process_of_rank(1, run) if logged == 1 else process.pid, signal.SIGTERM)     # one rank alone
        said = ended(process, run)
        silent.ended.set()
        assert ("training was waiting for the reference" if logged else "no work that was under way is lost") in said
        assert [folder.name for folder in run.glob("checkpoints/*")] == (
            [f"step-{steps_logged(run):06d}"] if logged else []), said
    assert "step 5 of 7 is saved" in said
    dpo_dist("train", *words, f"run.dir={run}")
    dpo_dist("train", *words, f"run.dir={tmp_path / 'straight'}")
    assert model_digest(run) == model_digest(tmp_path / "straight")
    assert [row["step"] for row in metrics(run, "eval")] == [0, 5, 7]


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_signal_while_answers_are_generated_keeps_the_step_before_them(tmp_path: Path, words: list[str], zero: str):
    words += [f"zero={zero}", "eval.samples=8", "eval.max_new_tokens=150", "train.eval_every_steps=2",
              "train.max_steps=3", "train.log_every_steps=1", f"run.dir={tmp_path / 'run'}"]
    process = start("train", *words)
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    os.kill(process.pid, signal.SIGTERM)
    said = ended(process, tmp_path / "run")
    assert "step 2 of 3 is saved, and the evaluation is made again" in said, said
    assert [row["step"] for row in metrics(tmp_path / "run", "eval")] == [0]
    dpo_dist("train", *words)
    assert [row["step"] for row in metrics(tmp_path / "run", "eval")] == [0, 2, 3]
    dpo_dist("train", *words, f"run.dir={tmp_path / 'straight'}")
    assert model_digest(tmp_path / "run") == model_digest(tmp_path / "straight")
