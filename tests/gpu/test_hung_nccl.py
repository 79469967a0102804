"""A rank that is stopped on a machine with several GPUs ends the job within the timeout, as under gloo
(distributed/test_watchdog.py)."""
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import process_of_rank, start, steps_logged, train_on, wait_until, write_rows, write_tiny_llama

pytestmark = [
    pytest.mark.gpu, pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def test_a_stopped_rank_ends_the_job_under_nccl_and_its_peer_says_where_it_stood(tmp_path: Path):
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 100)
    process = start("train", f"model.path={tmp_path / 'm'}", train_on(tmp_path / "rows.jsonl"), "zero=zero3",
                    "cluster.device=cuda", "cluster.procs_per_node=2", "cluster.timeout_seconds=20",
                    "train.max_steps=100000", "train.pairs_per_step=8", f"run.dir={tmp_path / 'run'}",
                    f"data.cache_dir={tmp_path / 'tokens'}", f"reference.cache_dir={tmp_path / 'reference'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGSTOP)
    assert process.wait(120) == 1
    assert "train.py" in (tmp_path / "run" / "logs" / "rank-0.log").read_text().partition("Timeout (0:00:")[2]
