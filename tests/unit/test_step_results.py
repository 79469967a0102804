"""Results of a step are read once the next one is queued: every row is written, in order, and no unsound step goes
unseen."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from dpo_dist.config.compose import compose
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.run.step_results import StepLog, StepResults
from dpo_dist.runtime.progress import Progress
from dpo_dist.runtime.world import World
from dpo_dist.sizing.flops import StepWork

CONFIG = compose(["model.path=m", "cluster.device=cpu"])


class Kept:
    """A tracker that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: Any) -> None:
        self.rows.append(dict(row))

    def finish(self, summary: Any) -> None:
        pass


def results(step: int, world: World, loss: float = 0.7, bad: float = 0.0, norm: float = 1.0,
            logs: bool = True) -> StepResults:
    sums, clock = MetricSums(CONFIG.loss, world.device), Clock(world)
    sums.tensor[0], sums.tensor[-2:] = 2 * loss, 2.0                 # two pairs
    clock.mark("forward")
    clock.count(StepWork(2, 10, 1.0))
    row = (sums, clock.interval({})) if logs else None
    return StepResults.of(step, 1e-6, torch.tensor(bad), torch.tensor(norm), row)


def test_a_row_is_written_when_the_next_step_is_queued_and_the_last_one_when_the_log_catches_up(world: World):
    tracker = Kept()
    log = StepLog(tracker, Progress(3, 0, ""), world)
    written = []
    for step in (1, 2, 3):
        log.add(results(step, world, loss=step / 10, norm=float(step)))
        written.append([row["step"] for row in tracker.rows])
    assert written == [[], [1], [1, 2]]
    log.catch_up()
    log.catch_up()
    assert ([(row["step"], row["grad_norm"], row["split"]) for row in tracker.rows]
            == [(1, 1.0, "train"), (2, 2.0, "train"), (3, 3.0, "train")])
    assert [row["loss"] for row in tracker.rows] == pytest.approx([0.1, 0.2, 0.3])


def test_a_value_is_that_of_its_own_step_whatever_comes_after(world: World):
    sums = MetricSums(CONFIG.loss, world.device)
    waiting = StepResults.of(1, 1e-6, torch.tensor(0.0), torch.tensor(1.0), (sums, Clock(world).interval({})))
    sums.tensor.fill_(7.0)
    assert waiting.logged is not None and not waiting.logged.total.values.any()


@pytest.mark.parametrize(("bad", "norm", "says"), [
    (1.0, 1.0, "the loss of step 5 is not finite; no weight was changed"),
    (0.0, float("nan"), "the gradient of step 5 is not finite"),
    (0.0, float("inf"), "the gradient of step 5 is not finite"), (0.0, -1.0, "the gradient of step 5 is not finite")])
def test_an_unsound_step_is_named_also_where_it_is_not_logged(bad: float, norm: float, says: str, world: World):
    tracker = Kept()
    log = StepLog(tracker, Progress(9, 0, ""), world)
    log.add(results(5, world, bad=bad, norm=norm, logs=False))
    with pytest.raises(FloatingPointError, match=says):
        log.add(results(6, world))
    assert tracker.rows == []
