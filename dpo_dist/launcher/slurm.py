"""cluster=slurm: stages as batch jobs that depend on each other, made from slurm/train.sbatch."""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.cluster import SlurmClusterConfig
from dpo_dist.config.compose import shipped
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.plan import LaunchPlan, Stage
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_object
from dpo_dist.runtime.run_dir import RunDir

BEGIN, END = "# >>> settings\n", "# <<< settings\n"
ALIVE_STATES = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SUSPENDED",
                "SIGNALING")


@dataclass(frozen=True)
class BatchJob:
    """A batch script and how it is submitted."""

    name: str
    script: str
    path: Path                         # where the script is kept
    arguments: tuple[str, ...]         # handed to the script
    after: tuple[str, ...] = ()        # names of the jobs that must succeed before
    served_by: tuple[str, ...] = ()    # names of the jobs that must have begun before


# --------------------------------------------------------------------------------------------------- a run's own stages


def start(launch: LaunchPlan, config: RunConfig, dry_run: bool) -> int:
    jobs, run_dir = jobs_of(launch, config), Path(launch.run_dir)
    if dry_run:
        print(describe(jobs))
        return 0
    busy = [job for job in recorded_jobs(run_dir).values() if is_alive(job)]
    if busy:
        raise UserError(f"run.dir={launch.run_dir} has jobs under way ({', '.join(busy)}); wait for them, or end them "
                        "with scancel")
    RunDir(run_dir).make(config.run.readable_by)
    ids = submit_jobs(jobs)
    record(run_dir, ids)
    for stage, job in ids.items():
        print(f"submitted {stage}: job {job}")
    print(f"output: {launch.run_dir}/slurm; where it is: dpo-dist status {launch.run_dir}")
    return 0


def commands(launch: LaunchPlan, config: RunConfig) -> dict[str, list[str]]:
    return {job.name: sbatch_command(job, {}) for job in jobs_of(launch, config)}


def jobs_of(launch: LaunchPlan, config: RunConfig) -> list[BatchJob]:
    """The stages as jobs, in order. Writes nothing."""
    folder = RunDir(launch.run_dir).slurm

    def job_of(stage: Stage) -> BatchJob:
        script = render(stage, config, job_name(launch.run_dir, stage.name), folder / f"{stage.name}-%j.out",
                        run_dir=stage.run_dir or launch.run_dir)
        companions = tuple(other.name for other in launch.stages if other.beside == stage.name)
        return BatchJob(stage.name, script, folder / f"{stage.name}.sbatch", stage.overrides, stage.after, companions)

    return [job_of(stage) for stage in launch.stages]


def submit_jobs(jobs: Sequence[BatchJob]) -> dict[str, str]:
    """Submits jobs in order, each after those that it names; {name: Slurm's id}. All or none: if Slurm refuses one, the
    others are cancelled, and UserError tells what Slurm said."""
    ids: dict[str, str] = {}
    for job in jobs:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.write_text(job.script)
        try:
            ids[job.name] = _sbatch(sbatch_command(job, ids))
        except UserError:
            if ids:
                subprocess.run(["scancel", *ids.values()], stdin=subprocess.DEVNULL)
            raise
    return ids


def sbatch_command(job: BatchJob, ids: Mapping[str, str]) -> list[str]:
    """The command that submits the job, given the ids of earlier ones. Slurm cancels a job that can no longer start."""
    wanted = [f"{how}:{':'.join(ids.get(name, f'<{name}>') for name in names)}"
              for how, names in (("afterok", job.after), ("after", job.served_by)) if names]
    before = [f"--dependency={','.join(wanted)}", "--kill-on-invalid-dep=yes"] if wanted else []
    return ["sbatch", "--parsable", *before, str(job.path), *job.arguments]


def describe(jobs: Sequence[BatchJob]) -> str:
    """The batch scripts and sbatch commands, as --dry-run prints them."""
    return "\n".join(f"# ---- {job.path}\n{job.script}\n# ---- submitted with\n{shlex.join(sbatch_command(job, {}))}\n"
                     for job in jobs)


def _sbatch(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("cluster=slurm, but there is no sbatch on this machine; run it on a login node, or set "
                        "cluster=local") from error
    if done.returncode:
        raise UserError(f"Slurm refused the job: {' '.join(done.stderr.split())}; see cluster.slurm in `--cfg job`, "
                        "and set cluster.device=cpu where the nodes have no GPUs")
    return done.stdout.strip().split(";")[0]


# ------------------------------------------------------------------------------------------------------------ rendering


def render(stage: Stage, config: RunConfig, name: str, output: Path, run_dir: str = "", tasks: Path | None = None,
           array: str | None = None) -> str:
    """slurm/train.sbatch with the settings of this stage in the place of its own."""
    assert isinstance(config.cluster, SlurmClusterConfig)
    slurm = config.cluster.slurm
    before, _, rest = shipped("slurm/train.sbatch").read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    options = [f"--job-name={name}", f'--output="{output}"', *([f"--array={array}"] if array else []),
               f"--signal=B:USR1@{slurm.signal_seconds}",
               *_machines(_nodes(stage, config.cluster), stage.procs_per_node if stage.computes else 0, config.cluster)]
    if stage.server_nodes:                # the second part of a heterogeneous job: nodes for the reference's servers
        options += ["hetjob", "--ntasks-per-node=1", "--requeue",
                    *_machines(str(stage.server_nodes), config.reference.server_gpus, config.cluster),
                    *slurm.server_extra]
    return "\n".join([before + BEGIN + "\n".join(f"#SBATCH {option}" for option in options),
                      *_variables(stage, config.cluster, run_dir, tasks), END + after])


def _nodes(stage: Stage, cluster: SlurmClusterConfig) -> str:
    """How many nodes Slurm may give the stage, as sbatch takes it."""
    least = min(cluster.min_nodes or stage.nodes, stage.nodes)
    return str(stage.nodes) if least == stage.nodes else f"{least}-{stage.nodes}"


def _machines(nodes: str, gpus: int, cluster: SlurmClusterConfig) -> list[str]:
    """The options of sbatch that ask for nodes, each with so many GPUs."""
    slurm = cluster.slurm
    optional = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time_limit,
                "exclude": slurm.exclude}
    return [f"--nodes={nodes}", *([] if cluster.device == "cpu" or not gpus else [f"--gpus-per-node={gpus}"]),
            *(f"--{key}={value}" for key, value in optional.items() if value is not None), *slurm.extra]


def _variables(stage: Stage, cluster: SlurmClusterConfig, run_dir: str, tasks: Path | None) -> list[str]:
    """The lines of bash that set what the rest of train.sbatch reads."""
    slurm = cluster.slurm
    own_python = bool(slurm.setup) or slurm.container_image is not None
    container = []
    if slurm.container_image is not None:
        folders = dict.fromkeys([os.getcwd(), *([str(Path(run_dir).resolve())] if run_dir else [])])
        mounts = [f"{path}:{path}" for path in folders]
        container = [f"--container-image={slurm.container_image}",
                     f"--container-mounts={','.join([*mounts, *slurm.container_mounts])}",
                     f"--container-workdir={os.getcwd()}"]
    values = {"PYTHON": "python" if own_python else sys.executable, "LAUNCH": str(shipped("launch")),
              "MODULE": stage.module, "PROCS_PER_NODE": str(stage.procs_per_node), "RUN_DIR": run_dir,
              "TASKS": str(tasks or ""), "PREFLIGHT": "yes" if slurm.preflight and stage.computes else "no",
              "MAX_REQUEUES": str(slurm.max_requeues), "MAX_RESTARTS": str(cluster.max_restarts)}
    return [*(f"{key}={shlex.quote(value)}" for key, value in values.items()), f"CONTAINER=({shlex.join(container)})",
            "setup() {", *(f"    {line}" for line in slurm.setup or (":",)), "}"]


def job_name(folder: str, stage: str) -> str:
    """A job's name: the run's folder and the stage, in letters that Slurm and file names take."""
    return re.sub(r"[^\w.-]", "-", f"{Path(folder).name}-{stage}")


# ------------------------------------------------------------------------------------------------------- jobs under way


def wait_for(job_ids: Sequence[str], seconds_between: float = 10.0) -> None:
    """Returns when none of these jobs (arrays: with all their tasks) is pending or running any more, however each
    ended. A controller that does not answer for a while is waited for, too."""
    for job in job_ids:
        while _may_be_alive(job):
            time.sleep(seconds_between)


def _may_be_alive(job: str) -> bool:
    try:
        return is_alive(job)
    except UserError:
        return True


def job_states(job: str) -> list[str]:
    """What Slurm says of a job, of an array of each of its tasks; empty where Slurm has forgotten it, or is not here.
    UserError where Slurm does not answer, which says nothing of the job."""
    try:
        done = subprocess.run(["scontrol", "--oneliner", "show", "job", job],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        return []
    if done.returncode == 0:
        return re.findall(r"\bJobState=(\S+)", done.stdout)
    answer = " ".join((done.stdout + done.stderr).split())
    if "Invalid job id" in answer:
        return []
    raise UserError(f"Slurm does not say how job {job} is: {answer}; try again when `scontrol ping` says that the "
                    "controller is up")


def is_alive(job: str) -> bool:
    """Whether any of the job is pending or running. UserError where Slurm does not answer."""
    return any(state.startswith(ALIVE_STATES) for state in job_states(job))


def recorded_jobs(run_dir: Path) -> dict[str, str]:
    """{stage: Slurm's id} as last submitted for this run."""
    found = found_object(RunDir(run_dir).slurm_jobs) or {}
    return {stage: job for stage, job in found.items()
            if isinstance(job, str) and re.fullmatch(r"\w[\w.+-]*", job, re.ASCII)}


def record(run_dir: Path, ids: Mapping[str, str]) -> None:
    """Keeps {stage: Slurm's id} where `dpo-dist status` looks."""
    write_json(RunDir(run_dir).slurm_jobs, dict(ids))
