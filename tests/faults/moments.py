"""When a fault strikes: so long after the start, or just after a file appears. Seconds alone would seldom meet the
short times in which files are written."""
from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("run/logs/rank-0.log", "tokens/*", "tokens/*/train/*.npy", "reference/*", "reference/*/*.safetensors",
         "run/run.json", "run/metrics.jsonl", "run/checkpoints/step-*", "run/checkpoints/step-000004/*",
         "run/checkpoints/step-000008/*", "run/checkpoints/step-000012/COMPLETE", "run/visits/*",
         "run/evaluations/*", "run/model.partial", "run/model", "run/DONE", "run/report.html")


@dataclass(frozen=True)
class Moment:
    seconds: float
    appears: str = ""            # a file of the trial's folder, as in Path.glob

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s after " + (f"{self.appears} appears" if self.appears else "the start")

    def wait(self, work: Path, process: Any) -> bool:
        """Returns at the moment; False where the command ended before."""
        there = set(work.glob(self.appears)) if self.appears else set()
        while self.appears and not set(work.glob(self.appears)) - there:
            if process.poll() is not None:
                return False
            time.sleep(0.003)
        time.sleep(self.seconds)
        return process.poll() is None


def any_moment(draw: random.Random, seconds: float) -> Moment:
    """Of a run that takes so many seconds."""
    if draw.random() < 0.5:
        return Moment(draw.uniform(0, seconds))
    return Moment(draw.choice((0.0, draw.uniform(0, 0.1), draw.uniform(0, 0.5))), draw.choice(FILES))
