"""A watched process ends when its watcher is told to, or when whoever started the watcher has gone."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from dpo_dist.runtime import child_process

WORK = """import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)"""


def begun(tmp_path: Path) -> subprocess.Popen[bytes]:
    """The watcher of a process that says when it has begun, and answers SIGTERM with exit code 7."""
    watcher = child_process.start([sys.executable, "-c", WORK, str(tmp_path / "begun")], tmp_path / "log", os.environ)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert watcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    return watcher


def test_a_watcher_that_is_told_to_end_lets_its_process_end_by_itself(tmp_path: Path):
    watcher = begun(tmp_path)
    watcher.terminate()
    assert watcher.wait(60) == 7, "not that of a process that was killed"


def test_a_watched_process_ends_with_the_one_that_started_the_watcher(tmp_path: Path):
    watcher = begun(tmp_path)
    child_process.stop(watcher)
    assert watcher.returncode == 7
