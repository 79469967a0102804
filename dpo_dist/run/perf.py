"""Speed and memory: where a step's time went, how much was computed, and the share of the device's peak."""
from __future__ import annotations

import re
import resource
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dpo_dist.runtime.world import World
from dpo_dist.sizing.flops import StepWork

# of a step's time. data: waiting for packs; wait: for the slowest rank; step: clipping and the update
PARTS = ("data", "forward", "backward", "wait", "step")
# by the device's name, ORNAMENTS aside; vendors' data sheets
DENSE_BF16_TFLOPS = {
    "B300": 2250, "GB200": 2500, "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989,
    "H100 PCIE": 756, "H100 NVL": 835,
    "H800": 989, "H20": 148, "A100": 312, "A100 PCIE": 312, "A800": 312, "A800 PCIE": 312, "L40S": 362, "L4": 121,
    "A40": 150, "A10": 125,
    "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
}
# words that leave the peak as it is
ORNAMENTS = re.compile(r"NVIDIA|AMD|INSTINCT|GEFORCE|TESLA|SXM\d*|AC|HBM3E?|\d+GB?")


@dataclass(frozen=True)
class Interval:
    """Some steps of training as a Clock saw them on this rank. A GPU's times are events, perhaps yet to come."""

    seconds: Mapping[str, float]                             # by part, on a CPU
    # (part, the event at its end); the first one is the beginning
    events: Sequence[tuple[str | None, Any]]
    steps: int
    work: StepWork
    peak_tflops: float | None
    saves: Mapping[str, float]                               # what there is to tell of checkpoints, as in a row

    def rates(self, world: World) -> dict[str, float]:
        """Rates over all ranks, and seconds a step. All ranks call it; waits for the interval's end."""
        mine = self._seconds_by_part()
        means = (world.sum(torch.tensor(mine)) / world.size).tolist()
        seconds = world.max(sum(mine))
        # Forward alone: the gradients' reduction lies inside backward, where a rank that is done waits for the others.
        # Under ZeRO-3 ranks also wait inside forward, for the weights, so there it shows a part of the unevenness only.
        forward = PARTS.index("forward")
        busiest, mean = world.max(mine[forward]), means[forward]
        row = {"perf/pairs_per_second": self.work.pairs / seconds, "perf/tokens_per_second": self.work.tokens / seconds,
               "perf/peak_memory_gib": world.max(peak_memory_gib(world.device)),
               **{f"perf/{part}_seconds": value / self.steps for part, value in zip(PARTS, means, strict=True)}}
        if mean:
            row["perf/busiest_rank"] = busiest / mean
        row |= self.saves
        if self.peak_tflops:
            row["perf/peak_tflops"] = self.peak_tflops
            row["perf/mfu"] = self.work.flops / (seconds * world.size * self.peak_tflops * 1e12)
        return row

    def _seconds_by_part(self) -> list[float]:
        seconds = defaultdict(float, self.seconds)
        if self.events:
            self.events[-1][1].synchronize()
        for (_, before), (part, event) in pairwise(self.events):
            if part is not None:
                seconds[part] += before.elapsed_time(event) / 1000
        return [seconds[part] for part in PARTS]


class Clock:
    """Training time, part by part: `mark(part)` says what the time since the last mark went to; None leaves it out.

    On a GPU marks are events on its stream: nothing waits for them until an interval's rates are asked for.
    """

    def __init__(self, world: World, peak_tflops: float | None = None):
        self._on_gpu, self._peak_tflops = world.device.type == "cuda", peak_tflops
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str | None, Any]] = []
        self._last = time.perf_counter()
        self._steps, self._work = 0, StepWork()
        self.mark(None)

    def mark(self, part: str | None) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((part, event))
            return
        now = time.perf_counter()
        if part is not None:
            self._seconds[part] += now - self._last
        self._last = now

    def count(self, work: StepWork) -> None:
        """A step is over in which all ranks together did this."""
        self._steps += 1
        self._work += work

    def interval(self, saves: Mapping[str, float]) -> Interval:
        """What was marked and counted since the last call. saves: what there is to tell of checkpoints (Saver.told)."""
        done = Interval(dict(self._seconds), tuple(self._events), self._steps, self._work, self._peak_tflops, saves)
        self._seconds.clear()
        self._events = self._events[-1:]
        self._steps, self._work = 0, StepWork()
        return done


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held so far: the GPU's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def known_peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense matrix peak from its data sheet; None where it is not known (a CPU, another dtype)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return sheet_tflops(torch.cuda.get_device_name(device))


def sheet_tflops(name: str) -> float | None:
    """The dense bf16 peak of the device with this name. None if any word of it is unknown: it may be a slice, or a
    smaller model."""
    words = re.split(r"[\s-]+", name.upper())
    return DENSE_BF16_TFLOPS.get(" ".join(word for word in words if not ORNAMENTS.fullmatch(word)))
