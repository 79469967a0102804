"""A rank of a run whose saves are timed: torchrun benchmarks/timed_saves.py FILE [overrides]. save_stall.py starts it,
also with an older version of the package."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from dpo_dist import train, train_run
from dpo_dist.policy.zero import ZeroPolicy
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.process import run_entry

saves: list[tuple[float, float]] = []          # (when a save began, when training went on)
steps: list[float] = []                        # when each update was made


def timed(method: Any, note: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = method(*args, **options)
        note(began, time.perf_counter())
        return result

    return call


def main() -> None:
    train_run.Run.save = timed(train_run.Run.save, lambda *times: saves.append(times))  # type: ignore[method-assign]
    ZeroPolicy.step = timed(ZeroPolicy.step, lambda _, end: steps.append(end))  # type: ignore[method-assign]
    code = run_entry(sys.argv[2:], train.train)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps({"saves": saves, "steps": steps}))
    exit_with(code)


if __name__ == "__main__":
    main()
