"""A run that goes on elsewhere: with another number of ranks, in another ZeRO stage, over a network that fails."""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

from conftest import REPO

from . import commands
from .bases import CACHED, MIDWAY
from .commands import Attempt
from .moments import any_moment
from .trial import Trial
from .verdict import LOST, RECOVERED, STOPPED, Verdict, given_once, hung

PLACES = (("cluster.procs_per_node=1",), ("cluster.procs_per_node=3",), ("zero=zero1",), ("zero=zero2",),
          ("zero=zero3",), ("zero=none", "cluster.procs_per_node=1"), ("zero=zero2", "cluster.procs_per_node=1"),
          ("zero=zero3", "cluster.procs_per_node=1"), ("zero=zero3", "cluster.procs_per_node=4"))
ONE_A_NODE = ("cluster.procs_per_node=1", "cluster.timeout_seconds=12")
one_network = Lock()


def another_world(trial: Trial) -> Verdict:
    """The same command but for its ranks or its ZeRO stage: the same losses to rounding."""
    trial.begin(MIDWAY)
    trial.to_rounding = True
    words = trial.random.choice(PLACES)
    trial.tell(f"goes on with {' '.join(words)}")
    trial.more.extend(words)
    trial.undo.append(trial.more.clear)
    return given_once(trial)


def cut_link(trial: Trial) -> Verdict:
    """Two machines (network namespaces) of one rank each, whose cable is pulled: for a while, or for good. With a good
    cable the same command goes on."""
    from namespaces import two_nodes

    trial.begin(CACHED, MIDWAY)
    trial.to_rounding = True
    moment = any_moment(trial.random, 12 + trial.base.seconds)           # they import, too
    seconds, which = trial.random.choice((0.5, 3.0, None)), trial.random.randrange(2)
    trial.tell(f"node {which}'s cable pulled {moment}, " + (f"for {seconds} s" if seconds else "for good"))
    with one_network, two_nodes() as nodes:
        processes = _start_on(nodes, trial, *ONE_A_NODE)
        began = time.monotonic()
        if moment.wait(trial.work, processes[0]):
            nodes[which].cut_off()
            if seconds:
                time.sleep(seconds)
                nodes[which].connect()
        first = _ended(processes, trial, began)
        if any(attempt.hung for attempt in first):
            return hung(trial)
        if all(attempt.code == 0 for attempt in first):
            found = trial.differences()
            return Verdict(LOST, "; ".join(found)) if found else Verdict(RECOVERED)
        nodes[which].connect()
        last = _ended(_start_on(nodes, trial, *ONE_A_NODE), trial, time.monotonic())
    if any(attempt.hung for attempt in last):
        return hung(trial)
    if found := [f"exit {one.code}: {one.terminal[-300:]}" for one in last if one.code] or trial.differences():
        return Verdict(LOST, "; ".join(found))
    unclean = [one.terminal[-500:] for one in first if one.code != 0 and (one.traceback or not one.errors)]
    return Verdict(LOST, f"unclean stop: {unclean[0]}") if unclean else Verdict(STOPPED, first[0].errors[0] if
                                                                                first[0].errors else "")


def _start_on(nodes: Any, trial: Trial, *more: str) -> list[Any]:
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPO),
                   "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NNODES": "2", "MASTER_ADDR": "node-0",
                   "MASTER_PORT": "29500", "PROCS_PER_NODE": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    return [node.start([REPO / "launch" / "node.sh", *trial.with_words(*more)[1:]],
                       {**environment, "NODE_RANK": str(rank)}, trial.work) for rank, node in enumerate(nodes)]


def _ended(processes: list[Any], trial: Trial, began: float) -> list[Attempt]:
    attempts = [trial.note(commands.finish_beside(process, trial.work, began)) for process in processes]
    commands.wait_until_gone(attempts[-1], trial.work)
    return attempts
