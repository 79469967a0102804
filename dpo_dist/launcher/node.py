"""This node's ranks of a run on several nodes: python -m dpo_dist.launcher.node [key=value ...], the same words on
every node.

    NNODES  NODE_RANK  MASTER_ADDR   how many nodes, which of them this is (from 0), and the name or address of node 0
    MASTER_PORT                      a port that is free on node 0 (29500)
    PROCS_PER_NODE                   processes on a node, the same on all (cluster.procs_per_node; else one a GPU)
    MODULE                           what runs: dpo_dist.train, dpo_dist.score, ... (dpo_dist.train)
    RUN_DIR                          where logs go (what the overrides say)
    MAX_RESTARTS                     of a node that is alone (cluster.max_restarts); several are started again together,
                                     by what started them: launch/hosts.sh, slurm/train.sbatch

Inside a Slurm job the first four are Slurm's where they are not set. launch/node.sh starts this; so do launch/hosts.sh,
a Slurm job and the container.
"""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.launcher.local import device_count, rank_environment
from dpo_dist.launcher.ranks import Place, Work
from dpo_dist.launcher.signals import TO_END, receiving
from dpo_dist.launcher.supervisor import run
from dpo_dist.runtime.run_dir import RunDir


def main(overrides: Sequence[str]) -> int:
    """0 where this node's ranks are done, or have saved after a signal; 130 after Ctrl-C. Failures are told on stderr,
    with the node's name."""
    try:
        config = compose(overrides)
        place = place_of(os.environ, config.cluster.procs_per_node or device_count(config.cluster))
        run_dir = RunDir(os.environ.get("RUN_DIR") or config.run_dir)
        run_dir.make(config.run.readable_by)
        max_restarts = read(os.environ, "MAX_RESTARTS", default=config.cluster.max_restarts, least=0)
        with receiving(*TO_END, for_good=True) as received:
            return _run(place, run_dir, overrides, received, max_restarts if place.nodes == 1 else 0,
                        config.cluster.timeout_seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(place: Place, run_dir: RunDir, overrides: Sequence[str], received: Sequence[int], max_restarts: int,
         timeout_seconds: float) -> int:
    module = os.environ.get("MODULE") or "dpo_dist.train"
    log, pid = run_dir.node_log(place.node), run_dir.node_pid(place.node)
    pid.write_text(f"{os.getpid()}\n")
    try:
        code = run(Work(module.rpartition(".")[2], module, tuple(overrides), run_dir, log, place,
                        rank_environment(place.procs), timeout_seconds=timeout_seconds), received,
                   max_restarts=max_restarts)
    finally:
        pid.unlink(missing_ok=True)
    stopped_by = run_dir.preempted_by()
    if stopped_by is not None:
        return 128 + stopped_by if stopped_by == signal.SIGINT else 0      # for srun, any other code is a failed node
    if code:
        print(f"error: node {place.node} ({socket.gethostname()}) ended with code {code}; its log is {log}",
              file=sys.stderr)
    return code


def place_of(environment: Mapping[str, str], procs: int) -> Place:
    """Where this node stands, with so many processes unless the environment says otherwise. UserError where it cannot
    know."""
    nodes = read(environment, "NNODES", "SLURM_JOB_NUM_NODES", default=1)
    node = read(environment, "NODE_RANK", "SLURM_NODEID", default=0, least=0)
    if node >= nodes:
        raise UserError(f"NODE_RANK={node} is not one of NNODES={nodes} nodes; set it to 0 on the first, to 1 on the "
                        "next, and so on")
    master = environment.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else _first_of_slurm(environment))
    port = read(environment, "MASTER_PORT", default=20000 + read(environment, "SLURM_JOB_ID", default=9500) % 10000)
    return Place(read(environment, "PROCS_PER_NODE", default=procs), node, nodes, master, port)


def read(environment: Mapping[str, str], *names: str, default: int, least: int = 1) -> int:
    """The number that the first of these variables which is set holds. UserError where it holds none."""
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        return default
    if not environment[name].isdecimal() or int(environment[name]) < least:
        raise UserError(f"{name}={environment[name]} is not a whole number of at least {least}; set it to one")
    return int(environment[name])


def _first_of_slurm(environment: Mapping[str, str]) -> str:
    remedy = "set it to the name or address of node 0"
    if not (nodelist := environment.get("SLURM_JOB_NODELIST")):
        raise UserError(f"MASTER_ADDR is not set; {remedy}")
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodelist],
                               stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(f"MASTER_ADDR is not set, and scontrol cannot read SLURM_JOB_NODELIST={nodelist} ({reason}); "
                        f"{remedy}") from error
    return shown.stdout.split()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
