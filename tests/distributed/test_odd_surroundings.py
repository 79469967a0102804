"""What surrounds a command and may be odd: closed streams, a limit on open files, a working folder that is gone."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, metrics, small_run, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed


def in_a_shell(script: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script, in which "$@" is dpo-dist with these words."""
    command = [sys.executable, "-m", "dpo_dist.launcher.cli", *words]
    return subprocess.run(["bash", "-c", script, "bash", *command], cwd=folder, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=240,
                          env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})


def small(folder: Path) -> list[str]:
    write_tiny_llama(folder / "m")
    write_rows(folder / "rows.jsonl", 40)
    return ["train", f"model.path={folder / 'm'}", train_on(folder / "rows.jsonl"), *small_run(folder), "zero=none",
            "train.max_steps=2", f"run.dir={folder / 'run'}"]


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_run_without_standard_streams_ends_well_and_nothing_is_printed_into_its_files(closed: str, tmp_path: Path):
    done = in_a_shell(f'"$@" {closed}', *small(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + (tmp_path / "run" / "logs" / "launcher.log").read_text()
    assert (tmp_path / "run" / "DONE").read_bytes() == b""
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_limit_on_open_files_is_told_with_its_number(tmp_path: Path):
    done = in_a_shell('ulimit -n 40; "$@"', *small(tmp_path), folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: Too many open files: a process may have 40 (ulimit -n); raise that" in done.stderr
    assert in_a_shell('"$@"', *small(tmp_path), folder=tmp_path).returncode == 0


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path):
    done = in_a_shell('mkdir gone && cd gone && rmdir ../gone && "$@"', "run", "model.path=m", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the working folder has been removed; cd to one that is there\n"
