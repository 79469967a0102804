"""Starts a command, waits for it no longer than a limit, and leaves no process of it behind."""
from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from conftest import REPO, forked_processes, kill, template

LIMIT_SECONDS = 90.0             # an undisturbed run takes 4 on two quiet cores, and up to 20 beside others
SECONDS_TO_LEAVE = 40.0          # for ranks whose launcher is gone: they save and end
# a library's message, or none at all
UNEXPLAINED = re.compile(r"^error: ((\w+: )?[\w.]*(Error|Exception)\b: |the \w+ stage ended with code 1; its logs)")
RANK = b"dpo_dist.runtime.rank"
one_at_a_time = Lock()


@dataclass
class Attempt:
    """How one start of the command ended."""

    code: int | None             # None: it was still at work when its time was over
    out: str
    err: str
    seconds: float
    left: list[int] = field(default_factory=list)      # ranks that were there long after the launcher had ended

    @property
    def terminal(self) -> str:
        return self.out + self.err

    @property
    def errors(self) -> list[str]:
        return [line for line in self.terminal.splitlines() if line.startswith("error:")]

    @property
    def hung(self) -> bool:
        return self.code is None or bool(self.left)

    @property
    def traceback(self) -> bool:
        """Whether there is one of ours on the terminal: not Python's own, where Ctrl-C came before any of our code."""
        _, found, rest = self.terminal.partition("Traceback (most recent call last)")
        return bool(found) and "dpo_dist" in rest

    @property
    def stopped_cleanly(self) -> bool:
        """It says why in one line of its own, which is no library's message; or a signal ended it in good order."""
        if self.traceback or self.hung:
            return False
        if self.code is not None and self.code > 128:
            return bool(self.terminal.strip())
        return self.code in (1, 2) and len(self.errors) == 1 and not UNEXPLAINED.search(self.errors[0])

    def said(self, *words: str) -> bool:
        return any(word in self.terminal for word in words)


def start(words: Iterable[object], work: Path, environment: Mapping[str, str]) -> Any:
    """The command, in the folder `work`: paths are part of a run's identity, so they are relative to it."""
    settings = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **environment}
    with one_at_a_time:
        return template().start(["dpo_dist.launcher.cli", *map(str, words)], settings, work)


def processes_in(work: Path) -> list[int]:
    """What works in this folder: the launcher, its ranks, and all that they started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):                          # it has ended
            if os.readlink(process / "cwd") == str(work) and not _only_answers(process):
                found.append(int(process.name))
    return found


def _only_answers(process: Path) -> bool:
    """Whether it is the template's own, which waits for a command to tell its exit code."""
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    return int(parent) == template().pid


def ranks_in(work: Path, rank: int | None = None) -> list[int]:
    """Processes of the ranks that work there, or of this one."""
    here = set(processes_in(work))
    return [pid for pid, words, its_rank in forked_processes()
            if pid in here and words[0] == RANK and (rank is None or int(its_rank or 0) == rank)]


def finish(process: Any, work: Path, began: float, limit: float = LIMIT_SECONDS) -> Attempt:
    """Once the command and all its ranks have ended, or were killed when their time was over."""
    attempt = finish_beside(process, work, began, limit)
    wait_until_gone(attempt, work)
    return attempt


def finish_beside(process: Any, work: Path, began: float, limit: float = LIMIT_SECONDS) -> Attempt:
    """As `finish`, without a look at other processes there."""
    try:
        out, err = process.communicate(timeout=max(0.1, began + limit - time.monotonic()))
        return Attempt(process.returncode, out, err or "", time.monotonic() - began)
    except subprocess.TimeoutExpired:
        end(process, work)
        out, err = process.communicate(timeout=10)
        return Attempt(None, out, err or "", time.monotonic() - began)


def wait_until_gone(attempt: Attempt, work: Path) -> None:
    """Notes who has not gone in time, and kills them."""
    left, until = processes_in(work), time.monotonic() + SECONDS_TO_LEAVE
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = processes_in(work)
    kill(left)
    attempt.left = left
    attempt.seconds += max(0.0, time.monotonic() - until + SECONDS_TO_LEAVE)


def end(process: Any, work: Path) -> None:
    """Kills the command with all its ranks."""
    with suppress(ProcessLookupError):
        process.kill()
    kill(processes_in(work))
