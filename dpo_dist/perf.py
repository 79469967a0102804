"""How fast and how large: what a step's time was spent on, how much was computed, and the share of the device's peak that it reached."""
from __future__ import annotations

import re
import resource
import time
from collections import defaultdict
from typing import Any

import torch

from dpo_dist.flops import StepWork
from dpo_dist.world import World

PARTS = ("data", "forward", "backward", "wait", "step")      # waiting for packs; ...; for the slowest rank; clipping and the update
DENSE_BF16_TFLOPS = {                                        # by the device's name, ORNAMENTS aside; vendors' data sheets
    "B300": 2250, "GB200": 2500, "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIE": 756, "H100 NVL": 835,
    "H800": 989, "H20": 148, "A100": 312, "A100 PCIE": 312, "A800": 312, "A800 PCIE": 312, "L40S": 362, "L4": 121, "A40": 150, "A10": 125,
    "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
}
ORNAMENTS = re.compile(r"NVIDIA|AMD|INSTINCT|GEFORCE|TESLA|SXM\d*|AC|HBM3E?|\d+GB?")     # words that leave the peak as it is


class Clock:
    """Training time, part by part: `mark(part)` says what the time since the last mark went to; None leaves it out.

    On a GPU marks are events on its stream: nothing waits for them until a row is logged.
    """

    def __init__(self, world: World, peak_tflops: float | None = None):
        self._world, self._peak_tflops = world, peak_tflops
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str | None, Any]] = []
        self._last = time.perf_counter()
        self._steps, self._work = 0, StepWork()
        self.mark(None)

    def mark(self, part: str | None) -> None:
        if self._world.device.type == "cuda":
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

    def read(self) -> dict[str, float]:
        """Rates over all ranks and seconds a step since the last call. All ranks call it."""
        self._collect_events()
        mine = [self._seconds[part] for part in PARTS]
        means = (self._world.sum(torch.tensor(mine)) / self._world.size).tolist()
        seconds = self._world.max(sum(mine))
        # Forward alone: the gradients' reduction lies inside backward, where a rank that is done waits for the others. Under ZeRO-3 ranks
        # also wait inside forward, for the weights, so there it shows a part of the unevenness only.
        busiest, mean = self._world.max(self._seconds["forward"]), means[PARTS.index("forward")]
        row = {"perf/pairs_per_second": self._work.pairs / seconds, "perf/tokens_per_second": self._work.tokens / seconds,
               "perf/peak_memory_gib": self._world.max(peak_memory_gib(self._world.device)),
               **{f"perf/{part}_seconds": value / self._steps for part, value in zip(PARTS, means, strict=True)}}
        if mean:
            row["perf/busiest_rank"] = busiest / mean
        if self._peak_tflops:
            row["perf/peak_tflops"] = self._peak_tflops
            row["perf/mfu"] = self._work.flops / (seconds * self._world.size * self._peak_tflops * 1e12)
        self._seconds.clear()
        self._steps, self._work = 0, StepWork()
        return row

    def _collect_events(self) -> None:
        if self._events:
            self._events[-1][1].synchronize()
            for (_, before), (part, event) in zip(self._events, self._events[1:], strict=False):
                if part is not None:
                    self._seconds[part] += before.elapsed_time(event) / 1000
            self._events = self._events[-1:]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held so far: the GPU's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def known_peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense matrix peak as its data sheet states it; None where it is not known here (a CPU, another dtype)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return sheet_tflops(torch.cuda.get_device_name(device))


def sheet_tflops(name: str) -> float | None:
    """The dense bf16 peak of the device of this name. None where any word of it is unknown: a part of a device, or a smaller kin."""
    words = re.split(r"[\s-]+", name.upper())
    return DENSE_BF16_TFLOPS.get(" ".join(word for word in words if not ORNAMENTS.fullmatch(word)))
