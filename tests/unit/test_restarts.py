"""When work that failed is started again, and when it is not."""
from __future__ import annotations

from pathlib import Path

from dpo_dist.launcher.restarts import Fault, Restarts
from dpo_dist.runtime.run_dir import COMPLETE, RunDir

KILLED = Fault("rank 1 was ended by SIGKILL", 1)


def saved(run_dir: RunDir, step: int) -> None:
    run_dir.checkpoint(step).mkdir(parents=True)
    (run_dir.checkpoint(step) / COMPLETE).touch()


def test_the_count_begins_anew_where_there_is_a_newer_checkpoint(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    restarts = Restarts(run_dir, 2)
    assert restarts.next(KILLED) == "restart 1 of 2, from the start"
    saved(run_dir, 10)
    assert restarts.next(KILLED) == "restart 1 of 2, from step-000010"
    assert restarts.next(KILLED) == "restart 2 of 2, from step-000010"
    assert restarts.next(KILLED) is None


def test_a_users_mistake_is_never_tried_again(tmp_path: Path):
    assert Restarts(RunDir(tmp_path), 3).next(Fault("model.path=m is no folder", 2)) is None


def test_an_exception_that_comes_again_is_no_accident_whichever_rank_tells_it(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    restarts = Restarts(run_dir, 3)
    assert restarts.next(Fault("KeyError: 1 (rank 0, see logs/rank-0.log)", 1, own=True))
    assert restarts.next(Fault("KeyError: 2 (rank 0, see logs/rank-0.log)", 1, own=True))
    assert restarts.next(Fault("KeyError: 2 (rank 1, see logs/rank-1.log)", 1, own=True)) is None


def test_0_restarts_are_none(tmp_path: Path):
    assert Restarts(RunDir(tmp_path), 0).next(KILLED) is None
