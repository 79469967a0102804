"""What the process wants to know of a step, read one step later: by then the device has it, and nobody waits."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Interval
from dpo_dist.run.tracking import MetricsRow, Tracker
from dpo_dist.runtime.later import Later
from dpo_dist.runtime.progress import Progress
from dpo_dist.runtime.world import World


class NotFinite(FloatingPointError):
    """A step whose loss or gradient was not finite."""

    def __init__(self, what: str, results: StepResults, grad_norm: float, then: str):
        self.what, self.step, self.lr, self.grad_norm, self.then = what, results.step, results.lr, grad_norm, then
        super().__init__(f"the {what} of step {self.step} is not finite; {then}")


@dataclass(frozen=True)
class Logged:
    """What a logged row is made of: of the steps since the row before."""

    sums: MetricSums
    total: Later                 # of `sums`, on this rank
    interval: Interval


@dataclass(frozen=True)
class StepResults:
    """Of one optimizer step that is queued on the device, maybe not computed."""

    step: int
    lr: float
    # float64 (2,): 1 where the loss was not finite on some rank, else 0; the gradients' norm
    soundness: Later
    logged: Logged | None        # where the step ends a row

    @classmethod
    def of(cls, step: int, lr: float, bad_loss: Tensor, grad_norm: Tensor,
           logged: tuple[MetricSums, Interval] | None) -> StepResults:
        soundness = Later(torch.stack([bad_loss.double(), grad_norm.to(bad_loss.device, torch.float64)]))
        return cls(
            step, lr, soundness, None if logged is None else Logged(logged[0], Later(logged[0].tensor), logged[1]))

    def check(self) -> float:
        """The gradients' norm. NotFinite, on all ranks alike, where the step was not sound."""
        bad_loss, grad_norm = self.soundness.values.tolist()
        if bad_loss:
            raise NotFinite("loss", self, grad_norm, "no weight was changed. Lower optim.lr, or look at the data")
        if not math.isfinite(grad_norm) or grad_norm < 0:          # DeepSpeed gives -1 for a norm that is not finite
            raise NotFinite("gradient", self, grad_norm, "the last checkpoint is from before. Lower optim.lr")
        return grad_norm

    def row(self, world: World) -> MetricsRow | None:
        """The row of metrics, where the step ends one. All ranks call it."""
        grad_norm = self.check()
        if self.logged is None:
            return None
        means = self.logged.sums.means(world, self.logged.total.values)
        return {"step": self.step, "split": "train", **means, "grad_norm": grad_norm, "lr": self.lr,
                **self.logged.interval.rates(world)}


class StepLog:
    """Reads each step's results once the next step is queued, and writes metrics rows. All ranks call its methods."""

    def __init__(self, tracker: Tracker, bar: Progress, world: World):
        self._tracker, self._bar, self._world = tracker, bar, world
        self._waiting: StepResults | None = None

    def add(self, results: StepResults) -> None:
        """Adds the results of the step just queued, and reads those before. Raises as StepResults.check does."""
        self.catch_up()
        self._waiting = results

    def catch_up(self) -> None:
        """Reads what is still waiting: afterwards every step that was added is computed, sound and logged."""
        results, self._waiting = self._waiting, None
        row = None if results is None else results.row(self._world)
        if row is not None:
            self._tracker.log(row)
            self._bar.update(int(row["step"]), loss=row["loss"], accuracy=row.get("rewards/accuracies"),
                             pairs_per_second=row["perf/pairs_per_second"])
