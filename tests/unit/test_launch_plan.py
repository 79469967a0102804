"""A command is planned without torch and without starting anything: stages, jobs, batch scripts, and where a run is."""
from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.node import place_of
from dpo_dist.launcher.plan import LaunchPlan, plan_stages
from dpo_dist.launcher.ranks import Place
from dpo_dist.launcher.slurm import describe, jobs_of, shipped
from dpo_dist.launcher.status import status
from dpo_dist.launcher.sweep.groups import Group, Job, make_job
from dpo_dist.launcher.sweep.run_slurm import rendered

SLURM = ["model.path=m", "cluster=slurm", "cluster.nodes=2", "run.dir=/runs/my run"]


def planned(words: list[str], verb: str = "run") -> tuple[LaunchPlan, RunConfig]:
    config = compose(words)
    return plan_stages(verb, config, words), config


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def variables(script: str) -> dict[str, str]:
    """What the settings of a rendered script are worth to a shell."""
    block = script.partition("# >>> settings")[2].partition("# <<< settings")[0]
    done = subprocess.run(["bash", "-c", block + "\nfor v in PYTHON MODULE PROCS_PER_NODE RUN_DIR TASKS PREFLIGHT; do "
                                                 "echo $v=${!v}; done; "
                           'echo "CONTAINER=${CONTAINER[*]}"; declare -f setup'], capture_output=True, text=True,
                          check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_a_run_is_audited_scored_and_trained_unless_there_is_nothing_to_score():
    launch, _ = planned(["model.path=m", "cluster=slurm", "cluster.procs_per_node=4", "cluster.nodes=2"])
    assert ([(s.name, s.module, s.ranks, s.after) for s in launch.stages]
            == [("audit", "dpo_dist.audit", 1, ()), ("score", "dpo_dist.score", 8, ("audit",)),
                ("train", "dpo_dist.train", 8, ("score",))])
    for alone in (["loss=simpo"], ["reference.mode=live"], ["reference=adapter_off", "model.lora.rank=4"]):
        assert [(s.name, s.after) for s in planned(["model.path=m", *alone])[0].stages] == [
            ("audit", ()), ("train", ("audit",))]
    assert [s.name for s in planned(["model.path=m"], "eval")[0].stages] == ["eval"]


def test_a_job_is_content_with_fewer_nodes_where_it_takes_several():
    words = [*SLURM, "cluster.nodes=4", "cluster.min_nodes=2", "cluster.max_restarts=7"]
    audit, score, train = jobs_of(*planned(words))
    assert "--nodes=2-4" in directives(train.script) and "--nodes=2-4" in directives(score.script)
    assert "--nodes=1" in directives(audit.script)
    assert "\nMAX_RESTARTS=7\n" in train.script


def test_every_option_of_a_job_reaches_its_script():
    slurm = {"partition": "gpu", "account": "lab", "qos": "high", "time_limit": "8:00:00", "signal_seconds": 600,
             "exclude": "node9", "preflight": "false"}
    words = [*SLURM, *(f"cluster.slurm.{key}={value}" for key, value in slurm.items()),
             "cluster.slurm.extra=['--mem=0']", "cluster.slurm.setup=['module load cuda','. venv/bin/activate']"]
    audit, score, train = jobs_of(*planned(words))
    assert {"--job-name=my-run-train", "--nodes=2", "--gpus-per-node=8", "--signal=B:USR1@600", "--partition=gpu",
            "--account=lab", "--qos=high", "--time=8:00:00", "--exclude=node9", "--mem=0",
            "--requeue"} <= set(directives(train.script))
    assert variables(train.script) == {"PYTHON": "python", "MODULE": "dpo_dist.train", "PROCS_PER_NODE": "8",
                                       "RUN_DIR": "/runs/my run", "TASKS": "", "PREFLIGHT": "no", "CONTAINER": ""}
    assert "    module load cuda\n    . venv/bin/activate\n" in score.script
    assert {"--nodes=1", "--partition=gpu", "--mem=0"} <= set(directives(audit.script)), "the audit reads data alone"
    assert variables(audit.script)["PROCS_PER_NODE"] == "1"
    assert not any(line.startswith("--gpus") for line in directives(audit.script))
    assert not any(line.startswith("--gpus")
                   for line in directives(jobs_of(*planned([*SLURM, "cluster.device=cpu"]))[1].script))


def test_a_container_sees_the_working_folder_the_run_and_what_else_is_named():
    words = [*SLURM, "cluster.slurm.container_image=/images/a.sqsh", "cluster.slurm.container_mounts=['/data:/data']"]
    container = variables(jobs_of(*planned(words))[0].script)["CONTAINER"]
    assert "--container-image=/images/a.sqsh" in container
    assert f"{Path.cwd()}:{Path.cwd()},/runs/my run:/runs/my run,/data:/data" in container


def test_a_folder_with_a_space_reaches_the_script_quoted():
    *_, train = jobs_of(*planned(SLURM))
    assert '--output="/runs/my run/slurm/train-%j.out"' in directives(train.script)


def test_training_waits_for_scoring_and_that_for_the_audit_and_each_is_cancelled_with_it():
    text = describe(jobs_of(*planned([*SLURM, "data.train=[{path: 'a b.jsonl'}]"])))
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("sbatch ")]
    assert commands[1][2:4] == ["--dependency=afterok:<audit>", "--kill-on-invalid-dep=yes"]
    assert commands[2][2:4] == ["--dependency=afterok:<score>", "--kill-on-invalid-dep=yes"]
    assert commands[0][-1] == "data.train=[{path: 'a b.jsonl'}]"


def test_the_stage_that_scores_gets_nodes_for_the_references_servers():
    served = [*SLURM, "cluster.slurm.extra=['--mem=0']", "reference=vllm", "reference.server=python",
              "reference.nodes=3", "reference.tensor_parallel_size=4", "cluster.slurm.server_extra=['--mem=1G']"]
    audit, score, train = jobs_of(*planned(served))
    assert "hetjob" not in directives(audit.script)
    ranks, servers = " ".join(directives(score.script)).split(" hetjob ")
    assert "--nodes=2 --gpus-per-node=8 --mem=0" in ranks
    assert servers == "--ntasks-per-node=1 --requeue --nodes=3 --gpus-per-node=4 --mem=0 --mem=1G"
    assert "hetjob" not in directives(train.script)
    _, live = jobs_of(*planned([*served, "reference.mode=live"]))
    assert "hetjob" in directives(live.script)
    _, beside, training = jobs_of(*planned([*served, "reference.mode=ahead"]))
    assert "hetjob" in directives(beside.script) and "hetjob" not in directives(training.script)
    with pytest.raises(UserError, match="which Slurm does not do"):
        rendered([Group((make_job([*served, "reference.mode=live"], (), Path("/nowhere")),), None)])


def test_the_template_is_a_batch_script_as_it_stands():
    subprocess.run(["bash", "-n", str(shipped("slurm/train.sbatch"))], check=True)
    for script in shipped("launch").iterdir():
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_sweep_is_one_array_a_group_whose_tasks_read_their_own_overrides(tmp_path: Path):
    def job(beta: float, *more: str) -> Job:
        return make_job([*SLURM[:3], f"loss.beta={beta}", "cluster.jobs_at_once=2", *more], ("cluster.jobs_at_once",),
                        tmp_path / "a sweep")

    text = rendered([Group((job(0.1), job(0.2)), job(0.1)), Group((job(0.3),), None)])
    assert "#SBATCH --array=0-1%2" in text and "#SBATCH --array=0-0%2" in text
    assert text.count("--dependency=afterok:<score>") == 1 and text.count("MODULE=dpo_dist.score") == 1
    assert text.count("--dependency=afterok:<audit>") == 2 and text.count("MODULE=dpo_dist.audit") == 2
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith(f"'{tmp_path}/a sweep/")]
    assert [line[0] for line in lines] == [str(job(beta).run_dir) for beta in (0.1, 0.2, 0.3)]
    assert "loss.beta=0.2" in lines[1] and compose(lines[1][1:]).run_dir == lines[1][0]
    assert text.count("--job-name=a-sweep-train") == 2
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="differ in `cluster`"):
        rendered([Group((job(0.1), job(0.2, "cluster.nodes=4")), None)])


def test_each_set_of_tasks_of_a_sweep_has_a_folder_of_its_own_and_the_same_tasks_the_same(tmp_path: Path):
    """An array task reads its line when it starts, which may be after a later command has submitted other trainings of
    the sweep."""
    def tasks_files(*betas: float) -> set[str]:
        group = Group(tuple(make_job([*SLURM[:3], f"loss.beta={beta}"], (), tmp_path) for beta in betas), None)
        return {line for line in rendered([group]).splitlines() if line.startswith("# ----")
                and line.endswith("/tasks")}

    assert tasks_files(0.1, 0.2) == tasks_files(0.1, 0.2)
    assert len(tasks_files(0.1, 0.2) | tasks_files(0.1) | tasks_files(0.1, 0.2, 0.3)) == 3


@pytest.mark.parametrize("words", [["plan"], ["run", "--dry-run"]])
def test_plan_and_dry_run_answer_without_torch_and_write_nothing(words: list[str], tmp_path: Path):
    script = ("import sys; from dpo_dist.launcher.cli import main; code = main(sys.argv[1:]); assert 'torch' not in "
              "sys.modules; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script, *words, *SLURM[:3], f"run.dir={tmp_path / 'run'}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dpo_dist.score" in done.stdout or "score.sbatch" in done.stdout
    assert not (tmp_path / "run").exists()


def test_plan_prints_the_command_that_run_starts():
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "plan", "model.path=m",
                           "cluster.procs_per_node=2"], cwd=REPO, capture_output=True, text=True, check=True)
    assert "train, after score" in done.stdout and "ranks   2: 1 node with 2" in done.stdout
    assert "-m torch.distributed.run --nproc-per-node 2" in done.stdout
    assert "-m dpo_dist.train model.path=m" in done.stdout


def test_status_tells_how_a_run_stands(tmp_path: Path):
    with pytest.raises(UserError, match="holds no run"):
        status(tmp_path)
    (tmp_path / "logs").mkdir()
    assert "step      none yet" in status(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7, "split": "train", "loss": 0.5})
                                            + '\n{"step": 8, "spl')
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": {"max_steps": 20}}}))
    for step in (5, 6):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000005" / "COMPLETE").touch()
    (tmp_path / "PREEMPTED").write_text(json.dumps({"message": "stopped by SIGUSR1", "signal": 10}))
    message = status(tmp_path)
    assert "7 of 20, loss 0.5000" in message
    assert "saved     step-000005\n" in message + "\n"
    assert "stopped early: stopped by SIGUSR1" in message
    (tmp_path / "PREEMPTED").unlink()
    (tmp_path / "DONE").touch()
    assert "state     done" in status(tmp_path)


def test_a_node_finds_its_place_in_its_environment_or_in_slurms():
    place = place_of({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500",
                      "PROCS_PER_NODE": "4"}, procs=1)
    assert place == Place(4, 1, 2, "node-0", 29500)
    assert place.environment(3) == {
        "RANK": "7", "LOCAL_RANK": "3", "GROUP_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
    assert place_of({"SLURM_JOB_NUM_NODES": "3", "SLURM_NODEID": "2", "MASTER_ADDR": "a",
                     "SLURM_JOB_ID": "70123"}, procs=8) == Place(8, 2, 3, "a", 20123)
    assert place_of({}, procs=1).environment(0) == {}, "a process that is alone has no place among others"


@pytest.mark.parametrize("environment, shown", [
    ({"NNODES": "2"}, "MASTER_ADDR is not set; set it"),
    ({"NNODES": "two"}, "NNODES=two is not a whole number of at least 1; set it"),
    ({"NNODES": "0"}, "NNODES=0 is not a whole number of at least 1; set it"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 is not one of NNODES=2 nodes; set it"),
    ({"PROCS_PER_NODE": "-1"}, "PROCS_PER_NODE=-1 is not a whole number"),
    ({"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "no]list["}, r"SLURM_JOB_NODELIST=no\]list\[ .*; set it"),
])
def test_a_node_that_cannot_know_its_place_says_what_to_set(environment: dict[str, str], shown: str):
    with pytest.raises(UserError, match=shown):
        place_of(environment, procs=1)


def test_help_ends_in_a_pipe_without_a_traceback():
    command = f"{sys.executable} -m dpo_dist.launcher.cli run --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
        first, code = done.stdout.splitlines()
        assert first.startswith("dpo-dist run") and code in ("0", "141") and done.stderr == ""
