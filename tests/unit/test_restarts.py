"""When work that failed is started again, and when it is not: by one machine's launcher, and by the shell for
several."""
from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_dist.config.compose import shipped
from dpo_dist.launcher.restarts import Fault, Restarts
from dpo_dist.runtime.run_dir import COMPLETE, FAILED, Failure, RunDir

KILLED = Fault("rank 1 was ended by SIGKILL", 1)


class InTheShell:
    """launch/restarts.sh, as Restarts; one bash that goes on."""

    def __init__(self, run_dir: RunDir, most: int):
        self._run_dir, self._most = run_dir, most
        self._bash = subprocess.Popen(["bash", "-u"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._say(f"RUN_DIR='{run_dir.path}'; . '{shipped('launch/restarts.sh')}'; echo")

    def next(self, fault: Fault) -> str | None:
        self._run_dir.clear(FAILED)
        self._run_dir.mark_failed(Failure(fault.message, fault.code, lost_peer=not fault.own))
        return self._say(f"if was_mistaken 143 || ! again {self._most}; then echo; else echo \"$restart\"; fi") or None

    def _say(self, line: str) -> str:
        assert self._bash.stdin and self._bash.stdout
        self._bash.stdin.write(f"{line}\n")
        self._bash.stdin.flush()
        return self._bash.stdout.readline().strip()

    def end(self) -> None:
        self._bash.communicate()


@pytest.fixture(params=[Restarts, InTheShell])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[int], Restarts | InTheShell]]:
    """Makes the rules of one of the two, with this many restarts."""
    found: list[Restarts | InTheShell] = []
    yield lambda most: found.append(request.param(RunDir(tmp_path), most)) or found[-1]
    for rules in found:
        if isinstance(rules, InTheShell):
            rules.end()


Made = Callable[[int], "Restarts | InTheShell"]


def saved(run_dir: RunDir, step: int) -> None:
    run_dir.checkpoint(step).mkdir(parents=True)
    (run_dir.checkpoint(step) / COMPLETE).touch()


def test_the_count_begins_anew_where_there_is_a_newer_checkpoint(made: Made, tmp_path: Path):
    run_dir, restarts = RunDir(tmp_path), made(2)
    assert restarts.next(KILLED) == "restart 1 of 2, from the start"
    saved(run_dir, 10)
    assert restarts.next(KILLED) == "restart 1 of 2, from step-000010"
    assert restarts.next(KILLED) == "restart 2 of 2, from step-000010"
    assert restarts.next(KILLED) is None


def test_a_users_mistake_is_never_tried_again(made: Made):
    assert made(3).next(Fault("model.path=m is no folder", 2)) is None


def test_an_exception_that_comes_again_is_no_accident_whichever_rank_tells_it(made: Made):
    restarts = made(3)
    assert restarts.next(Fault("KeyError: 1 (rank 0, see logs/rank-0.log)", 1, own=True))
    assert restarts.next(Fault("KeyError: 2 (rank 0, see logs/rank-0.log)", 1, own=True))
    assert restarts.next(Fault("KeyError: 2 (rank 1, see logs/rank-1.log)", 1, own=True)) is None


def test_0_restarts_are_none(made: Made):
    assert made(0).next(KILLED) is None
