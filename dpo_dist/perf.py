"""How fast and how large: pairs and tokens a second of training time, and peak memory."""
from __future__ import annotations

import resource
import time

import torch

from dpo_dist.metrics import MetricSums
from dpo_dist.world import World


class Clock:
    """Training time between two logged rows, without evaluations and checkpoints."""

    def __init__(self, world: World):
        self._world = world
        self._busy, self._since = 0.0, time.perf_counter()

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._busy += time.perf_counter() - self._since

    def read(self, sums: MetricSums) -> dict[str, float]:
        """Rates over all ranks since the last call. All ranks call it."""
        seconds = self._world.max(self._busy)
        self._busy = 0.0
        pairs, tokens = self._world.sum(torch.tensor([sums.pairs, sums.tokens])).tolist()
        return {"perf/pairs_per_second": pairs / seconds, "perf/tokens_per_second": tokens / seconds,
                "perf/peak_memory_gib": self._world.max(peak_memory_gib(self._world.device))}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held so far: the GPU's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
