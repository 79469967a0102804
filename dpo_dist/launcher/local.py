"""cluster=local: stages as processes on this machine, in turn."""
from __future__ import annotations

import glob
import os
import sys
from math import inf

from dpo_dist.config.cluster import ClusterConfig
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.plan import LaunchPlan, Stage
from dpo_dist.launcher.ranks import Place, Work
from dpo_dist.launcher.signals import TO_END, receiving
from dpo_dist.launcher.supervisor import ended_early, run
from dpo_dist.runtime.ports import free_port
from dpo_dist.runtime.run_dir import RunDir

NOTHING_SUBMITTED = ("--dry-run shows batch scripts, and cluster=local has none; see `dpo-dist plan`, or set "
                     "cluster=slurm")


def device_count(cluster: ClusterConfig) -> int:
    """GPUs that the processes would see; 1 where the work is done on the CPU."""
    return max(1, len(devices(cluster)))


def devices(cluster: ClusterConfig) -> list[str]:
    """The GPUs that the processes would see, as CUDA_VISIBLE_DEVICES names them; empty where the CPU does the work."""
    if cluster.device == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return _visible_devices()
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def _visible_devices() -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES; none where it is not set, or hides all devices."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [name for name in names if name and name != "-1"]


def start(launch: LaunchPlan, config: RunConfig, dry_run: bool) -> int:
    if dry_run:
        raise UserError(NOTHING_SUBMITTED)
    RunDir(launch.run_dir).make(config.run.readable_by)
    return run_stages(launch, config.cluster.max_restarts, config.cluster.timeout_seconds)


def commands(launch: LaunchPlan, config: RunConfig) -> dict[str, list[str]]:
    return {stage.name: by_hand(stage) for stage in launch.stages}


def run_stages(plan: LaunchPlan, max_restarts: int = 0, timeout_seconds: float = inf) -> int:
    """Runs the stages in turn until one fails or is stopped. The exit code is the last stage's: 0 only when it is done.

    A signal to end starts no further stage, nor one again.
    """
    names = [stage.name for stage in plan.stages]
    with receiving(*TO_END) as received:
        for stage in plan.stages:
            if stage.beside in names:
                continue
            if received:
                return ended_early(received, f"before the {stage.name} stage", RunDir(plan.run_dir))
            companions = [other for other in plan.stages if other.beside == stage.name]
            total = stage.procs_per_node + sum(companion.procs_per_node for companion in companions)
            work = _work(stage, plan.run_dir, total, timeout_seconds)
            beside = [_work(companion, plan.run_dir, total, timeout_seconds, quiet=True) for companion in companions]
            code = run(work, received, beside, max_restarts)
            if code:
                return code
    return 0


def by_hand(stage: Stage) -> list[str]:
    """The command line that starts a stage by hand: python alone for one process, torchrun for several."""
    module = ["-m", stage.module, *stage.overrides]
    if stage.ranks == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(stage.procs_per_node), *module]


def _work(stage: Stage, run_dir: str, procs_on_machine: int, timeout_seconds: float, quiet: bool = False) -> Work:
    folder = RunDir(stage.run_dir or run_dir)
    environment = rank_environment(procs_on_machine)
    if stage.devices is not None:
        named = _visible_devices()
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(named[d] if named else str(d) for d in stage.devices)
    return Work(stage.name, stage.module, stage.overrides, folder, folder.launcher_log,
                Place(stage.procs_per_node, master_port=free_port()), environment, quiet, timeout_seconds)


def rank_environment(procs_on_machine: int) -> dict[str, str]:
    """This process's environment, with an equal share of the processors for each rank unless a person has set one."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // procs_on_machine)), **os.environ,
            "PYTHONUNBUFFERED": "1"}
