"""For launch/preflight: all ranks of all nodes meet once before the work: a sum over them, a look at their clocks."""
from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World

TIMEOUT_SECONDS = 120
SKEW_SECONDS = 30.0               # beyond it, checkpoints' and logs' times mislead


def main() -> int:
    """0 where every rank got the right sum. Leaves $REPORTS/<node>.joined once this node's ranks met the others."""
    config = compose(sys.argv[1:])
    reports, node = Path(os.environ["REPORTS"]), os.environ["NODE_NAME"]
    try:
        world = World.start(dataclasses.replace(config.cluster, timeout_seconds=TIMEOUT_SECONDS))
    except UserError as error:
        (reports / node).write_text(f"{error}\n")
        return 2
    (reports / f"{node}.joined").touch()
    total = world.on_device_sum(float(world.rank))
    if total != world.size * (world.size - 1) / 2:
        (reports / node).write_text(f"the sum of all ranks is {total}\n")
        return 1
    clocks = world.gather((node, time.time()))
    middle = statistics.median(at for _, at in clocks)
    late = [f"{name} is {at - middle:+.0f} s off" for name, at in sorted(set(clocks))
            if abs(at - middle) > SKEW_SECONDS]
    if late and world.is_main:
        print(f"preflight: the clocks differ: {'; '.join(late)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_with(main())
