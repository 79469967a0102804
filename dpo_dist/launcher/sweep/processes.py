"""Runs several dpo-dist commands as processes, each with its own share of the machine's devices."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.cluster import ClusterConfig
from dpo_dist.config.errors import UserError
from dpo_dist.launcher.local import devices, rank_environment
from dpo_dist.launcher.signals import receiving

POLL_SECONDS = 0.1

Place = Mapping[str, str]                # what a job's environment has besides this process's


@dataclass(frozen=True)
class Command:
    """What a person would type after `dpo-dist`, and where its output goes; None = to this process's own."""

    words: tuple[str, ...]
    output: Path | None = None


def places(cluster: ClusterConfig) -> list[Place]:
    """`cluster.jobs_at_once` places with equal shares of the devices. UserError where they cannot be shared so."""
    n = cluster.jobs_at_once or 1
    if n == 1:
        return [{}]
    found = devices(cluster)
    if not found:                                        # processors are shared by the system; threads are not
        threads = rank_environment(n * (cluster.procs_per_node or 1))["OMP_NUM_THREADS"]
        return [{"OMP_NUM_THREADS": threads}] * n
    if len(found) % n:
        raise UserError(f"cluster.jobs_at_once={n} does not divide the {len(found)} devices of this machine; set it to "
                        "a divisor")
    share = len(found) // n
    if (cluster.procs_per_node or 0) > share:
        raise UserError(f"cluster.procs_per_node={cluster.procs_per_node} is more than each job's share of {share} "
                        f"devices; remove it, or lower cluster.jobs_at_once={n}")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(found[i * share:(i + 1) * share])} for i in range(n)]


def run_commands(commands: Sequence[Command], where: Sequence[Place], began: Callable[[int], None] = lambda i: None,
                 ended: Callable[[int, int, float], None] = lambda i, code, seconds: None) -> list[int]:
    """Exit codes. As many run at once as there are places; one that fails does not stop the others.

    began(i) and ended(i, code, seconds) are told of command i. Ctrl-C reaches the commands too, and SIGTERM is handed
    to them: none is started any more, those that run are waited for, and KeyboardInterrupt follows.
    """
    codes = [-1] * len(commands)
    waiting, free = deque(range(len(commands))), deque(where)
    running: dict[int, tuple[subprocess.Popen[bytes], Place, float]] = {}
    with receiving(signal.SIGTERM, signal.SIGINT) as received:
        while (waiting or running) and not received:
            while waiting and free:
                i, place = waiting.popleft(), free.popleft()
                began(i)
                running[i] = (_start(commands[i], place), place, time.monotonic())
            time.sleep(POLL_SECONDS)
            for i, (process, place, started) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[i]
                    free.append(place)
                    codes[i] = code
                    ended(i, code, time.monotonic() - started)
    for process, *_ in running.values():
        if signal.SIGTERM in received:
            process.terminate()
    for process, *_ in running.values():
        process.wait()
    if received:
        raise KeyboardInterrupt
    return codes


def _start(command: Command, place: Place) -> subprocess.Popen[bytes]:
    if command.output is not None:
        command.output.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if command.output is None else command.output.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "dpo_dist.launcher.cli", *command.words],
                                env={**os.environ, **place}, stdin=subprocess.DEVNULL,
                                stdout=out, stderr=None if out is None else subprocess.STDOUT)
