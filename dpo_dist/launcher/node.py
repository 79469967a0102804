"""This node's ranks of a run on several: python -m dpo_dist.launcher.node [key=value ...]. Every node is given the same
overrides.

    NNODES  NODE_RANK  MASTER_ADDR   how many nodes, which of them this is (from 0), and the name or address of node 0
    MASTER_PORT                      a port that is free on node 0 (29500)
    PROCS_PER_NODE                   processes on a node, the same on all (one a GPU, or one)
    MODULE                           what runs: dpo_dist.train, dpo_dist.score, ... (dpo_dist.train)
    RUN_DIR                          where logs go (what the overrides say)

Inside a Slurm job the first four are Slurm's where they are not set. launch/node.sh starts this; so do launch/hosts.sh,
a Slurm job and the container.
"""
from __future__ import annotations

import glob
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.launcher.local import rank_environment
from dpo_dist.launcher.supervisor import SIGNALS_TO_END, Place, Work, receiving, run
from dpo_dist.runtime.run_dir import RunDir


def main(overrides: Sequence[str]) -> int:
    """0 where this node's ranks have done their work; what failed is told on stderr, with the node's name."""
    try:
        place = place_of(os.environ)
        run_dir = RunDir(Path(os.environ.get("RUN_DIR") or compose(overrides).run_dir))
        with receiving(*SIGNALS_TO_END) as received:
            return _run(place, run_dir, overrides, received)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(place: Place, run_dir: RunDir, overrides: Sequence[str], received: Sequence[int]) -> int:
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    log, pid = run_dir.node_log(place.node), run_dir.node_pid(place.node)
    pid.write_text(f"{os.getpid()}\n")
    try:
        code = run(Work("training", os.environ.get("MODULE") or "dpo_dist.train", tuple(overrides), run_dir, log, place,
                        rank_environment(place.procs)), received)
    finally:
        pid.unlink(missing_ok=True)
    if code and run_dir.preempted_by() is None:
        print(f"error: node {place.node} ({socket.gethostname()}) ended with code {code}; its log is {log}",
              file=sys.stderr)
    return code


def place_of(environment: Mapping[str, str]) -> Place:
    """Where this node stands. UserError where it cannot know."""
    def read(*names: str, default: int) -> int:
        return next((int(environment[name]) for name in names if environment.get(name)), default)

    nodes = read("NNODES", "SLURM_JOB_NUM_NODES", default=1)
    master = environment.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else _first_of_slurm(environment))
    port = read("MASTER_PORT", default=20000 + read("SLURM_JOB_ID", default=9500) % 10000)
    return Place(read("PROCS_PER_NODE", default=max(1, len(glob.glob("/dev/nvidia[0-9]*")))),
                 read("NODE_RANK", "SLURM_NODEID", default=0),
                 nodes, master, port)


def _first_of_slurm(environment: Mapping[str, str]) -> str:
    if not environment.get("SLURM_JOB_NODELIST"):
        raise UserError("MASTER_ADDR is not set; set it to the name or address of node 0")
    shown = subprocess.run(["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]], capture_output=True,
                           text=True, check=True)
    return shown.stdout.split()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
