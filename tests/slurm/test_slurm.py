"""On a real Slurm of three nodes: what is interrupted goes on to the very bits, what is cancelled stays so, bad nodes
are left out."""
from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    REPO,
    dpo_dist,
    eval_on,
    metrics,
    model_digest,
    processes_on,
    steps_logged,
    train_on,
    write_rows,
    write_tiny_llama,
)
from slurm_cluster import NEEDED, Slurm

from dpo_dist.config.errors import UserError
from dpo_dist.launcher.slurm import BatchJob, job_states, submit_jobs, wait_for
from dpo_dist.launcher.sweep.groups import group_jobs, make_job
from dpo_dist.launcher.sweep.run_slurm import submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.distributed]

STEPS, PAIRS = 60, 64
WHOLE_NODES = "cluster.slurm.extra=['--cpus-per-task=4']"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs Debian's slurm-wlm, munge and iproute2 (no {', '.join(missing)})" if missing
                    else "needs root")
    cluster = Slurm.start(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_llama(folder / "m", hidden_size=64, intermediate_size=128)
    write_rows(folder / "rows.jsonl", PAIRS, longest=40)
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    """Two nodes with a process each, ZeRO-3, in fp32 on the CPU."""
    return [f"model.path={folder / 'm'}", train_on(folder / "rows.jsonl"), "cluster=slurm", "cluster.device=cpu",
            "cluster.nodes=2", "cluster.procs_per_node=1", "cluster.timeout_seconds=60",
            "cluster.slurm.preflight=false", WHOLE_NODES, "model.dtype=fp32", f"data.cache_dir={folder / 'tokens'}",
            f"reference.cache_dir={folder / 'reference'}", "data.max_length=256", "train.pairs_per_step=8",
            f"train.max_steps={STEPS}", "train.epochs=10", "train.save_every_steps=10", "optim.lr=1e-3"]


@pytest.fixture(scope="module")
def straight(folder: Path, words: list[str]) -> Path:
    """The same run without Slurm and interruptions: as many processes on one machine."""
    run_dir = folder / "a straight run"
    local = [word for word in words if not word.startswith("cluster")]
    dpo_dist("run", *local, "cluster.device=cpu", "cluster.procs_per_node=2", f"run.dir={run_dir}")
    return run_dir


def output(run_dir: Path, stage: str = "train") -> str:
    return "".join(path.read_text() for path in (run_dir / "slurm").glob(f"{stage}-*.out"))


def under_way(slurm: Slurm, words: list[str], run_dir: Path) -> str:
    """The id of a training job whose first step is done."""
    job = slurm.submit("train", [*words, f"run.dir={run_dir}"])["train"]
    until_first_step(slurm, run_dir)
    return job


def until_first_step(slurm: Slurm, run_dir: Path) -> None:
    slurm.until("the first step", lambda: steps_logged(run_dir) > 0)


def assert_went_on_to_the_same_bits(slurm: Slurm, job: str, run_dir: Path, straight: Path) -> None:
    slurm.until_state(job, "COMPLETED", "FAILED", "CANCELLED", start_now=True)
    assert slurm.show(job, "JobState") == "COMPLETED", output(run_dir)
    assert int(slurm.show(job, "Restarts")) >= 1
    assert "resumed from step-" in output(run_dir)
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in metrics(run_dir)] == [row["loss"] for row in metrics(straight)]
    assert model_digest(run_dir) == model_digest(straight)


def test_two_nodes_with_two_processes_score_and_train_with_zero_3_to_the_end(
        slurm: Slurm, folder: Path, words: list[str]):
    """Scored, trained and exported as two jobs, after a look at the nodes."""
    run_dir = folder / "two by two"
    ids = slurm.submit("run", [*words, "cluster.procs_per_node=2", "cluster.slurm.preflight=true",
                               f"run.dir={run_dir}"])
    slurm.until_state(ids["train"], "COMPLETED", "FAILED", "CANCELLED")
    assert (run_dir / "DONE").exists(), output(run_dir, "score") + output(run_dir)
    written = json.loads((run_dir / "run.json").read_text())
    assert written["passport"]["ranks"] == 4 and written["config"]["zero"]["stage"] == 3
    assert f"scored {2 * PAIRS}, cached 0" in output(run_dir, "score")
    nodes = re.search(r"on (\S+) (\S+): dpo_dist.train", output(run_dir))
    assert nodes and nodes[1] != nodes[2]
    assert len(list((run_dir / "logs" / "preflight").glob("*/*.joined"))) == 4           # two nodes, two jobs
    shown = slurm.dpo_dist("status", run_dir)
    assert "state     done" in shown and f"step      {STEPS} of {STEPS}" in shown and "COMPLETED" in shown


def test_usr1_saves_and_requeues_and_the_run_goes_on_to_the_same_bits(
        slurm: Slurm, folder: Path, words: list[str], straight: Path):
    job = under_way(slurm, words, folder / "usr1")
    slurm.call("scancel", "--batch", "--signal=USR1", job)          # what Slurm itself sends ahead of the time limit
    slurm.until("the requeue", lambda: slurm.show(job, "Restarts") == "1")
    assert "SIGUSR1" in (folder / "usr1" / "PREEMPTED").read_text()
    assert_went_on_to_the_same_bits(slurm, job, folder / "usr1", straight)
    assert not (folder / "usr1" / "PREEMPTED").exists()


def test_usr1_in_the_first_seconds_requeues_the_job_whatever_it_is_at(slurm: Slurm, folder: Path, words: list[str]):
    run_dir = folder / "early"
    job = slurm.submit("train", [*words, "train.max_steps=2", f"run.dir={run_dir}"])["train"]
    slurm.until("its output", lambda: list((run_dir / "slurm").glob("*.out")), seconds=30)
    for restarts, seconds in enumerate((0, 3)):           # of a start: bash, then torch begin
        slurm.until_state(job, "RUNNING", start_now=True)
        time.sleep(seconds)
        slurm.call("scancel", "--batch", "--signal=USR1", job)
        slurm.until("the requeue", lambda wanted=str(restarts + 1): slurm.show(job, "Restarts") == wanted, seconds=60)
        assert "SIGUSR1" in (run_dir / "PREEMPTED").read_text()
    slurm.until_state(job, "COMPLETED", "FAILED", "CANCELLED", start_now=True)
    assert slurm.show(job, "JobState") == "COMPLETED" and len(metrics(run_dir)) == 2, output(run_dir)


def test_a_rank_that_dies_on_one_node_restarts_all_within_the_allocation(
        slurm: Slurm, folder: Path, words: list[str], straight: Path):
    run_dir = folder / "a rank dies"
    job = under_way(slurm, words, run_dir)
    slurm.until("a checkpoint", lambda: any((run_dir / "checkpoints").glob("*/COMPLETE")))
    for pid in processes_on(run_dir):
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
    slurm.until_state(job, "COMPLETED", "FAILED", "CANCELLED")
    shown = output(run_dir)
    assert slurm.show(job, "JobState") == "COMPLETED" and slurm.show(job, "Restarts") == "0", shown
    assert "error: rank 1 was ended by SIGKILL" in shown and "restart 1 of 3, from step-0000" in shown
    assert model_digest(run_dir) == model_digest(straight)


def test_a_run_whose_node_is_gone_for_good_goes_on_with_those_that_are_left(
        slurm: Slurm, folder: Path, words: list[str], straight: Path):
    run_dir = folder / "fewer"
    job = under_way(slurm, [*words, "cluster.min_nodes=1", "cluster.slurm.exclude=node3"], run_dir)
    slurm.until("a checkpoint", lambda: any((run_dir / "checkpoints").glob("*/COMPLETE")))
    slurm.testbed("kill", 2)
    slurm.until("the requeue", lambda: slurm.show(job, "Restarts") == "1", seconds=300)
    slurm.until_state(job, "COMPLETED", "FAILED", "CANCELLED", start_now=True)
    assert slurm.show(job, "JobState") == "COMPLETED" and "start 2, on node1: dpo_dist.train" in output(run_dir)
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))
    for row, same in zip(metrics(run_dir), metrics(straight), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-5)
    slurm.testbed("boot", 2)
    slurm.until("node2", lambda: slurm.call("sinfo", "-h", "-n", "node2", "-p", "main", "-o", "%T").strip() == "idle")


def test_a_job_preempted_by_a_higher_partition_goes_on_to_the_same_bits(
        slurm: Slurm, folder: Path, words: list[str], straight: Path):
    job = under_way(slurm, words, folder / "preempted")
    urgent = slurm.call("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null",
                        "--wrap=sleep 1").strip()
    slurm.until_state(urgent, "RUNNING", "COMPLETED")
    assert slurm.show(job, "Restarts") == "1" and "SIGTERM" in (folder / "preempted" / "PREEMPTED").read_text()
    assert_went_on_to_the_same_bits(slurm, job, folder / "preempted", straight)


def test_a_job_submitted_by_hand_saves_when_it_is_cancelled_and_stays_cancelled(
        slurm: Slurm, folder: Path, words: list[str]):
    run_dir = folder / "cancelled"
    own = [*(word for word in words if not word.startswith("cluster")), "cluster.device=cpu", f"run.dir={run_dir}"]
    job = slurm.call("env", f"PYTHON={sys.executable}", "PROCS_PER_NODE=2", "PREFLIGHT=no", "sbatch", "--parsable",
                     "--nodes=2", "--cpus-per-task=4", f"--output={folder}/by-hand.out",
                     REPO / "slurm" / "train.sbatch", *own).strip()
    until_first_step(slurm, run_dir)
    slurm.call("scancel", job)
    slurm.until_state(job, "CANCELLED")
    slurm.until("the end of its processes", lambda: "saved and ended early" in (folder / "by-hand.out").read_text())
    assert list((run_dir / "checkpoints").glob("*/COMPLETE"))
    assert slurm.show(job, "JobState") == "CANCELLED" and slurm.show(job, "Restarts") == "0"
    assert "stopped early" in slurm.dpo_dist("status", run_dir)


def test_a_power_cut_of_one_node_costs_only_the_steps_since_the_last_checkpoint(
        slurm: Slurm, folder: Path, words: list[str], straight: Path):
    job = under_way(slurm, words, folder / "power")
    slurm.until("a checkpoint", lambda: any((folder / "power" / "checkpoints").glob("*/COMPLETE")))
    slurm.testbed("kill", 2)
    slurm.until("the requeue", lambda: slurm.show(job, "Restarts") == "1", seconds=300)
    assert_went_on_to_the_same_bits(slurm, job, folder / "power", straight)
    slurm.testbed("boot", 2)
    slurm.until("node2", lambda: slurm.call("sinfo", "-h", "-n", "node2", "-p", "main", "-o", "%T").strip() == "idle")


def test_a_job_that_slurm_requeues_once_too_often_ends(slurm: Slurm, folder: Path, words: list[str]):
    job = under_way(slurm, [*words, "cluster.slurm.max_requeues=0"], folder / "too_often")
    slurm.call("scontrol", "requeue", job)                # as Slurm itself does it after a preemption
    slurm.until("the requeue", lambda: slurm.show(job, "Restarts") == "1")
    slurm.until_state(job, "FAILED", "COMPLETED", start_now=True)
    assert slurm.show(job, "JobState") == "FAILED"
    assert "this would be start 2, and max_requeues is 0" in output(folder / "too_often")


def in_its_environment(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)


def test_a_refused_job_takes_those_submitted_with_it_away(slurm: Slurm, folder: Path, monkeypatch: pytest.MonkeyPatch):
    in_its_environment(slurm, monkeypatch)
    jobs = [BatchJob(name, f"#!/bin/bash\n#SBATCH --output=/dev/null --partition={partition}\nsleep 600\n",
                     folder / f"{name}.sbatch", ())
            for name, partition in (("accepted", "main"), ("refused", "nowhere"))]
    with pytest.raises(UserError, match="invalid partition"):
        submit_jobs(jobs)
    slurm.until("its end", lambda: slurm.call("squeue", "--noheader", "--states=all", "--name=accepted.sbatch",
                                              "--format=%T").strip()
                == "CANCELLED")


def test_a_slurm_that_does_not_answer_is_not_taken_for_the_end_of_a_job(
        slurm: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nobody = tmp_path / "slurm.conf"                     # a controller's port where nothing listens
    nobody.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1", Path(slurm.environment["SLURM_CONF"]).read_text()))
    in_its_environment(slurm, monkeypatch)
    assert job_states("999999") == job_states("999999_3") == []
    (tmp_path / "slurm.json").write_text(json.dumps({"train": "999999"}))
    assert "Slurm knows nothing of it any more" in slurm.dpo_dist("status", tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(nobody))
    with pytest.raises(UserError, match="Slurm does not say how job 999999 is"):
        job_states("999999")
    assert "unknown: Slurm does not say" in Slurm(dict(os.environ)).dpo_dist("status", tmp_path)


def test_a_node_that_fails_the_preflight_is_named_left_out_and_the_job_goes_on_without_it(
        slurm: Slurm, folder: Path, words: list[str]):
    run_dir = folder / "bad_node"
    broken = ("cluster.slurm.setup=['export PYTHON=$([ $(hostname) = node2 ] && echo /nowhere/python || echo "
              f"{sys.executable})']")
    job = slurm.submit("train", [*words, "cluster.slurm.preflight=true", broken, "train.max_steps=2",
                                 f"run.dir={run_dir}"])["train"]
    slurm.until_state(job, "COMPLETED", "FAILED", start_now=True)
    assert slurm.show(job, "JobState") == "COMPLETED", output(run_dir)
    assert "preflight failed: node2: " in output(run_dir) and "/nowhere/python" in output(run_dir)
    assert slurm.show(job, "ExcNodeList") == "node2" and "node1 node3: dpo_dist.train" in output(run_dir)


def test_trainings_whose_scoring_failed_are_cancelled_and_not_pending_for_ever(
        slurm: Slurm, folder: Path, words: list[str]):
    ids = slurm.submit("run", [*words[1:], f"model.path={folder / 'nothing'}", f"run.dir={folder / 'unscored'}"])
    slurm.until_state(ids["audit"], "FAILED")
    slurm.until_state(ids["train"], "CANCELLED", seconds=120)
    assert not (folder / "unscored" / "metrics.jsonl").exists()


def served(*command: object) -> list[str]:
    """A reference whose servers are this command, on two nodes; the ranks are on one."""
    return ["cluster.nodes=1", "train.max_steps=2", "reference=vllm", "reference.nodes=2", "reference.audit.pairs=8",
            "cluster.timeout_seconds=600", "reference.requests.wait_seconds=500",
            f"reference.server='{' '.join(map(str, command))}'"]


def test_the_reference_is_served_from_nodes_of_its_own(slurm: Slurm, folder: Path, words: list[str]):
    run_dir, server = folder / "served", REPO / "tests" / "log_prob_server.py"
    ids = slurm.submit("run", [*words,
                               *served(sys.executable, server,
                                       "--model {model} --name {name} --host {host} --port {port}"),
                               f"reference.cache_dir={folder / 'served_reference'}", f"run.dir={run_dir}"])
    slurm.until_state(ids["train"], "COMPLETED", "FAILED", "CANCELLED")
    assert (run_dir / "DONE").exists(), output(run_dir, "score") + output(run_dir)
    shown = output(run_dir, "score")
    ranks = re.search(r"on (\S+): dpo_dist.score", shown)
    servers = re.search(r"from http://(\S+):\d+, http://(\S+):\d+", shown)
    assert ranks and servers and len({ranks[1], servers[1], servers[2]}) == 3
    assert f"scored {2 * PAIRS}, cached 0" in shown
    assert json.loads((run_dir / "parity.json").read_text())["servers"] == 2
    assert metrics(run_dir)[0]["loss"] == pytest.approx(math.log(2),
                                                        abs=1e-5), "the policy starts from the weights that are served"
    slurm.until("the end of the servers", lambda: not slurm.call("squeue", "--noheader", "--jobs", ids["score"],
                                                                 code=None).strip())


def test_a_server_that_does_not_start_fails_the_scoring_at_once(slurm: Slurm, folder: Path, words: list[str]):
    run_dir, broken = folder / "unserved", folder / "broken.py"
    broken.write_text("raise SystemExit('out of memory')\n")
    ids = slurm.submit("run", [*words, *served(sys.executable, broken, "{port}"),
                               f"reference.cache_dir={folder / 'unserved_reference'}", f"run.dir={run_dir}"])
    slurm.until_state(ids["score"], "FAILED", seconds=200)           # not after reference.requests.wait_seconds
    slurm.until_state(ids["train"], "CANCELLED", seconds=120)
    assert re.search(r"error: node\d: reference.server=.* ended with code 1 before it answered: out of memory",
                     output(run_dir, "score"))


def test_a_sweep_is_one_scoring_job_and_one_array(slurm: Slurm, folder: Path, words: list[str],
                                                  monkeypatch: pytest.MonkeyPatch):
    in_its_environment(slurm, monkeypatch)
    small = [*words, "cluster.nodes=1", "cluster.procs_per_node=1", "zero=none", "train.max_steps=2",
             "cluster.slurm.extra=['--cpus-per-task=2']", f"reference.cache_dir={folder / 'sweep_reference'}"]
    trainings = [make_job([*small, "cluster.jobs_at_once=3", f"loss.beta={beta}", f"optim.lr={lr}"], (),
                          folder / "sweep")
                 for beta in (0.05, 0.3) for lr in (5e-4, 1e-3)]
    (ids,) = submit(group_jobs(trainings, folder / "sweep"))
    wait_for([ids.score, ids.array], seconds_between=0.5)
    (scripts,) = (folder / "sweep" / "slurm").iterdir()
    shown = "".join(path.read_text() for path in scripts.glob("score-*.out"))
    assert f"scored {2 * PAIRS}, cached 0" in shown
    finals = set()
    for i, job in enumerate(trainings):
        assert (job.run_dir / "DONE").exists(), list(scripts.iterdir())
        recorded = json.loads((job.run_dir / "slurm.json").read_text())
        assert recorded == {"audit": recorded["audit"], "score": ids.score, "train": f"{ids.array}_{i}"}
        assert "COMPLETED" in slurm.dpo_dist("status", job.run_dir)
        finals.add(model_digest(job.run_dir))
    assert len(finals) == 4
    assert "--array=0-3%3" in (scripts / "train.sbatch").read_text()


def test_the_sweep_command_waits_for_its_jobs_and_compares_them(slurm: Slurm, folder: Path, words: list[str]):
    write_rows(folder / "eval.jsonl", 8, seed=5)
    sweep = [*words, eval_on(folder / "eval.jsonl"), "cluster.nodes=1", "cluster.procs_per_node=1", "zero=none",
             "train.max_steps=2", "cluster.slurm.extra=['--cpus-per-task=2']",
             f"reference.cache_dir={folder / 'command_reference'}", f"run.dir={folder / 'command'}",
             "loss.beta=0.05,0.3", "optim.lr=5e-4,1e-3"]
    first = slurm.dpo_dist("run", "-m", *sweep)
    assert re.search(r"sweep: 4 trainings are array \d+, after scoring job \d+", first)
    shown = json.loads((folder / "command" / "sweep.json").read_text())
    assert [job["done"] for job in shown["jobs"]] == [True] * 4 and shown["best"]
    assert "4 are done, 0 to run" in slurm.dpo_dist("run", "-m", *sweep)
