"""cluster=slurm: stages as batch jobs that depend on each other, rendered from slurm/train.sbatch, which also works by hand."""
from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config import RunConfig, SlurmConfig, UserError
from dpo_dist.launcher.plan import LaunchPlan, Stage, plan

JOBS_FILE = "slurm.json"               # in run.dir: {stage: Slurm's id}
BEGIN, END = "# >>> settings\n", "# <<< settings\n"
STATES_OF_THE_LIVING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SUSPENDED", "SIGNALING")


@dataclass(frozen=True)
class Job:
    """A batch script and how it is submitted."""

    name: str
    script: str
    path: Path                         # where the script is kept
    arguments: tuple[str, ...]         # handed to the script
    after: tuple[str, ...] = ()        # names of the jobs that must succeed before
    served_by: tuple[str, ...] = ()    # names of the jobs that must have begun before


# -------------------------------------------------------------------------------------------------------- a run's own stages


def jobs_of(launch: LaunchPlan, config: RunConfig) -> list[Job]:
    """The stages as jobs, in order. Writes nothing."""
    folder = Path(launch.run_dir) / "slurm"
    return [Job(stage.name, render(stage, config, _name(launch.run_dir, stage.name), folder / f"{stage.name}-%j.out",
                                   run_dir=stage.run_dir or launch.run_dir),
                folder / f"{stage.name}.sbatch", stage.overrides, stage.after,
                tuple(each.name for each in launch.stages if each.beside == stage.name)) for stage in launch.stages]


def submit(launch: LaunchPlan, config: RunConfig) -> dict[str, str]:
    """Submits the stages; {stage: job id}, which is also kept in <run.dir>/slurm.json."""
    jobs = jobs_of(launch, config)
    busy = [job for job in recorded_jobs(Path(launch.run_dir)).values() if is_alive(job)]
    if busy:
        raise UserError(f"run.dir={launch.run_dir} has jobs under way ({', '.join(busy)}); wait for them, or end them with scancel")
    ids = submit_jobs(jobs)
    _record(Path(launch.run_dir), ids)
    return ids


def submit_jobs(jobs: Sequence[Job]) -> dict[str, str]:
    """Submits jobs in order, each after those it names; {name: Slurm's id}. Raises UserError with what Slurm said."""
    ids: dict[str, str] = {}
    for job in jobs:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.write_text(job.script)
        ids[job.name] = _sbatch(sbatch_command(job, ids))
    return ids


def sbatch_command(job: Job, ids: Mapping[str, str]) -> list[str]:
    """The command that submits the job, given the ids of those before it. A job whose condition can no longer come true is cancelled."""
    wanted = [f"{how}:{':'.join(ids.get(name, f'<{name}>') for name in names)}"
              for how, names in (("afterok", job.after), ("after", job.served_by)) if names]
    before = [f"--dependency={','.join(wanted)}", "--kill-on-invalid-dep=yes"] if wanted else []
    return ["sbatch", "--parsable", *before, str(job.path), *job.arguments]


def describe(jobs: Sequence[Job]) -> str:
    """The batch scripts and sbatch commands, as --dry-run prints them."""
    return "\n".join(f"# ---- {job.path}\n{job.script}\n# ---- submitted with\n{shlex.join(sbatch_command(job, {}))}\n" for job in jobs)


def _sbatch(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("cluster=slurm, but there is no sbatch on this machine; run it on a login node, or set cluster=local") from error
    if done.returncode:
        raise UserError(f"Slurm refused the job: {' '.join(done.stderr.split())}; see cluster.slurm in `--cfg job`, and set "
                        "cluster.device=cpu where the nodes have no GPUs")
    return done.stdout.strip().split(";")[0]


# ------------------------------------------------------------------------------------------------------------------ sweeps


@dataclass(frozen=True)
class Task:
    """One entry of a sweep: its config, and the overrides that compose it (`cluster=slurm` and `run.dir=...` among them)."""

    config: RunConfig
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class SweepGroup:
    """Trainings that share one reference: `score` is one of them whose data hold all their pairs; None where nothing needs scoring."""

    score: Task | None
    trainings: tuple[Task, ...]


@dataclass(frozen=True)
class SubmittedGroup:
    """Slurm's ids: the scoring job (None where there was none), and the array, whose task i is the group's training i."""

    score_job: str | None
    array_job: str


def submit_sweep(groups: Sequence[SweepGroup], folder: Path, at_once: int | None = None) -> list[SubmittedGroup]:
    """The jobs of a sweep: for each group one scoring job, then one array (--array=0-N%at_once) whose tasks each run one training.

    Batch scripts and the tasks' overrides are written into `folder`, which every node must see. An array starts when its own group's
    scoring has succeeded, and is cancelled when that has failed; a failed training stops no other. Each run's job ids are kept in
    its <run.dir>/slurm.json, which `dpo-dist status` reads. `at_once`: trainings of a group that run at the same time; None = all.
    Returns at once; `wait_for` waits. Raises UserError where a group's trainings differ in `cluster`, or where Slurm refuses a job.
    """
    submitted = []
    for i, group in enumerate(groups):
        jobs = _jobs_of_group(group, folder / f"group-{i}", at_once)
        (folder / f"group-{i}").mkdir(parents=True, exist_ok=True)
        _tasks_file(folder / f"group-{i}").write_text(_task_lines(group))
        ids = submit_jobs(jobs)
        for n, task in enumerate(group.trainings):
            _record(Path(task.config.run_dir), {**ids, "train": f"{ids['train']}_{n}"})
        submitted.append(SubmittedGroup(ids.get("score"), ids["train"]))
    return submitted


def render_sweep(groups: Sequence[SweepGroup], folder: Path, at_once: int | None = None) -> str:
    """The batch scripts and the sbatch commands that `submit_sweep` would use, as text for --dry-run; starts and writes nothing."""
    texts = []
    for i, group in enumerate(groups):
        here = folder / f"group-{i}"
        texts += [describe(_jobs_of_group(group, here, at_once)), f"# ---- {_tasks_file(here)}", _task_lines(group)]
    return "\n".join(texts)


def _jobs_of_group(group: SweepGroup, folder: Path, at_once: int | None) -> list[Job]:
    first = group.trainings[0]
    if any(task.config.cluster != first.config.cluster for task in group.trainings):
        raise UserError("the trainings of a sweep differ in `cluster`, but one array has one shape; sweep over other keys")
    jobs = []
    if group.score is not None:
        (stage,) = plan("score", group.score.config, group.score.overrides).stages
        run_dir = group.score.config.run_dir
        script = render(stage, group.score.config, _name(str(folder.parent), stage.name), folder / "score-%j.out", run_dir=run_dir)
        jobs.append(Job("score", script, folder / "score.sbatch", stage.overrides))
    (stage,) = plan("train", first.config, ()).stages
    if stage.server_nodes:
        raise UserError(f"reference.nodes={first.config.reference.nodes} with reference.mode=live would give each task of an array nodes of "
                        "its own for servers, which Slurm does not do; set reference.mode=cached")
    array = f"0-{len(group.trainings) - 1}" + (f"%{at_once}" if at_once else "")
    script = render(stage, first.config, _name(str(folder.parent), stage.name), folder / "train-%a-%A.out", tasks=_tasks_file(folder),
                    array=array)
    return [*jobs, Job("train", script, folder / "train.sbatch", (), ("score",) if jobs else ())]


def _tasks_file(folder: Path) -> Path:
    return folder / "tasks"


def _task_lines(group: SweepGroup) -> str:
    return "".join(shlex.join([task.config.run_dir, *task.overrides]) + "\n" for task in group.trainings)


# --------------------------------------------------------------------------------------------------------------- rendering


def render(stage: Stage, config: RunConfig, name: str, output: Path, run_dir: str = "", tasks: Path | None = None,
           array: str | None = None) -> str:
    """slurm/train.sbatch with the settings of this stage in the place of its own."""
    slurm = config.cluster.slurm
    assert slurm is not None, "rules.py has seen to it"
    before, _, rest = shipped("slurm/train.sbatch").read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    options = _options(stage, config, slurm, name, output, array)
    if stage.server_nodes:
        options += ["hetjob", *_server_options(stage, config, slurm)]
    options = [f"#SBATCH {option}" for option in options]
    return "\n".join([before + BEGIN + "\n".join(options), *_variables(stage, config, slurm, run_dir, tasks), END + after])


def _options(stage: Stage, config: RunConfig, slurm: SlurmConfig, name: str, output: Path, array: str | None) -> list[str]:
    return [f"--job-name={name}", f"--output={output}", *([f"--array={array}"] if array else []), f"--signal=B:USR1@{slurm.signal_seconds}",
            *_machines(stage.nodes, stage.procs_per_node, config, slurm)]


def _server_options(stage: Stage, config: RunConfig, slurm: SlurmConfig) -> list[str]:
    """The second part of a heterogeneous job: nodes for the reference's servers."""
    return ["--ntasks-per-node=1", "--requeue", *_machines(stage.server_nodes, config.reference.tensor_parallel_size or 1, config, slurm),
            *slurm.server_extra]


def _machines(nodes: int, gpus: int, config: RunConfig, slurm: SlurmConfig) -> list[str]:
    optional = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time_limit, "exclude": slurm.exclude}
    return [f"--nodes={nodes}", *([] if config.cluster.device == "cpu" else [f"--gpus-per-node={gpus}"]),
            *(f"--{key}={value}" for key, value in optional.items() if value is not None), *slurm.extra]


def _variables(stage: Stage, config: RunConfig, slurm: SlurmConfig, run_dir: str, tasks: Path | None) -> list[str]:
    own_python = bool(slurm.setup) or slurm.container_image is not None
    container = []
    if slurm.container_image is not None:
        mounts = [f"{path}:{path}" for path in dict.fromkeys([os.getcwd(), *([str(Path(run_dir).resolve())] if run_dir else [])])]
        container = [f"--container-image={slurm.container_image}", f"--container-mounts={','.join([*mounts, *slurm.container_mounts])}",
                     f"--container-workdir={os.getcwd()}"]
    values = {"PYTHON": "python" if own_python else sys.executable, "LAUNCH": str(shipped("launch")), "MODULE": stage.module,
              "PROCS_PER_NODE": str(stage.procs_per_node), "RUN_DIR": run_dir, "TASKS": str(tasks or ""),
              "PREFLIGHT": "yes" if slurm.preflight else "no", "MAX_REQUEUES": str(slurm.max_requeues)}
    return [*(f"{key}={shlex.quote(value)}" for key, value in values.items()), f"CONTAINER=({shlex.join(container)})",
            "setup() {", *(f"    {line}" for line in slurm.setup or (":",)), "}"]


def _name(folder: str, stage: str) -> str:
    """A job's name: the run's folder and the stage, in letters that Slurm and file names take."""
    return re.sub(r"[^\w.-]", "-", f"{Path(folder).name}-{stage}")


def shipped(name: str) -> Path:
    """A folder or file of launch/ or slurm/: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


# ------------------------------------------------------------------------------------------------------------ jobs under way


def wait_for(job_ids: Sequence[str], seconds_between: float = 10.0) -> None:
    """Returns when none of these jobs (arrays: with all their tasks) is pending or running any more, however each ended."""
    while any(is_alive(job) for job in job_ids):
        time.sleep(seconds_between)


def job_states(job: str) -> list[str]:
    """What Slurm says of a job, of an array of each of its tasks; empty where Slurm has forgotten it, or is not here."""
    try:
        done = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return re.findall(r"\bJobState=(\S+)", done.stdout) if done.returncode == 0 else []


def is_alive(job: str) -> bool:
    """Whether any of the job is pending or running."""
    return any(state.startswith(STATES_OF_THE_LIVING) for state in job_states(job))


def recorded_jobs(run_dir: Path) -> dict[str, str]:
    """{stage: Slurm's id} as last submitted for this run."""
    path = run_dir / JOBS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _record(run_dir: Path, ids: Mapping[str, str]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    new = run_dir / f"{JOBS_FILE}.new"
    new.write_text(json.dumps(dict(ids)) + "\n")
    new.rename(run_dir / JOBS_FILE)
