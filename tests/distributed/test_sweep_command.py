"""A sweep pays for the reference once, a failed run does not stop the others, and the same sweep again runs only what
is missing."""
from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from conftest import REPO, dpo_dist, eval_on, metrics, processes_on, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed
PAIRS, HELD_OUT = 24, 8


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    """A sweep of a tiny model; what is swept is missing."""
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    write_rows(tmp_path / "eval.jsonl", HELD_OUT, seed=5)
    return ["run", "-m", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "eval.jsonl"), "zero=none", "train.pairs_per_step=8", f"run.dir={tmp_path / 'sweep'}"]


def summary(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "sweep" / "sweep.json").read_text())


def scorings(tmp_path: Path) -> Counter[tuple[str, bytes]]:
    """How often each sequence stands in the reference's cache."""
    shards = [(shard.parent.name, safetensors.numpy.load_file(shard)["keys"])
              for shard in (tmp_path / "reference").rglob("*.safetensors")]
    return Counter((folder, key.tobytes()) for folder, keys in shards for key in keys)


def written(tmp_path: Path) -> dict[str, int]:
    """When each metrics.jsonl of the sweep was written last, in nanoseconds."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/metrics.jsonl")}


def test_a_3_by_2_sweep_scores_each_sequence_once_and_the_second_invocation_trains_nothing(tmp_path: Path,
                                                                                           words: list[str]):
    sweep = [*words, "loss.beta=0.05,0.1,0.3", "optim.lr=1e-3,2e-3"]
    first = dpo_dist(*sweep, "cluster.jobs_at_once=2", timeout=600)
    assert first.stdout.count(f"scored {2 * (PAIRS + HELD_OUT)}, cached 0") == 1
    assert len(scorings(tmp_path)) == 2 * (PAIRS + HELD_OUT) and set(scorings(tmp_path).values()) == {1}
    jobs = summary(tmp_path)["jobs"]
    assert len(jobs) == 6 and all(job["done"] and (Path(job["run_dir"]) / "DONE").exists() for job in jobs)
    assert [job["swept"] for job in jobs] == [{"loss.beta": b, "optim.lr": lr} for b in (0.05, 0.1, 0.3)
                                              for lr in (1e-3, 2e-3)]
    for job in jobs:
        last = metrics(Path(job["run_dir"]), "eval")[-1]
        assert job["metrics"] == {name: value for name, value in last.items() if name not in ("step", "split")}
        assert last["reference/kl_per_token"] > 0 and last["reference/chosen_drift_per_token"] != 0
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count('class="plot"') >= 4 + 1 and page.count('/report.html">open</a>') == 6

    before = written(tmp_path)
    second = dpo_dist(*sweep)
    assert "6 are done, 0 to run" in second.stdout and "scored" not in second.stdout
    assert written(tmp_path) == before
    assert second.stdout.split("\n\n")[1] == first.stdout.split("\n\n")[-2], "the same table"


def test_a_swept_run_is_the_run_that_the_printed_command_trains(tmp_path: Path, words: list[str]):
    dpo_dist(*words, "loss.beta=0.1,0.3", "optim.lr=1e-3")
    shown = summary(tmp_path)["best"]
    verb, *overrides = shlex.split(shown["command"])[1:]
    dpo_dist(verb, *overrides, f"run.dir={tmp_path / 'alone'}")
    assert metrics(tmp_path / "alone", "eval") == metrics(Path(shown["run_dir"]), "eval")


def test_a_failed_run_stops_no_other_and_the_same_sweep_again_runs_what_is_missing(tmp_path: Path, words: list[str]):
    sweep = [*words, "optim.lr=1e-3,1e30,2e-3"]
    done = dpo_dist(*sweep, code=1)
    assert "failed: optim.lr=1e+30: the loss of step 2 is not finite" in done.stdout
    assert [job["done"] for job in summary(tmp_path)["jobs"]] == [True, False, True]
    before = written(tmp_path)
    again = dpo_dist(*words, "optim.lr=1e-3,2e-3,3e-3")             # the bad one taken out, another put in
    assert "2 are done, 1 to run" in again.stdout and f"scored 0, cached {2 * (PAIRS + HELD_OUT)}" in again.stdout
    assert {name for name, when in written(tmp_path).items() if before.get(name) != when} == {
        Path(summary(tmp_path)["jobs"][2]["run_dir"]).name}
    assert set(scorings(tmp_path).values()) == {1}


def test_runs_whose_references_differ_are_scored_apart_and_a_failed_scoring_fails_its_own_runs_alone(
        tmp_path: Path, words: list[str]):
    write_tiny_llama(tmp_path / "r", seed=1)
    done = dpo_dist(*words, f"reference.path={tmp_path / 'm'},{tmp_path / 'r'},{tmp_path / 'missing'}", "optim.lr=1e-3",
                    code=1)
    assert done.stdout.count(f"scored {2 * (PAIRS + HELD_OUT)}, cached 0") == 2
    assert [job["done"] for job in summary(tmp_path)["jobs"]] == [True, True, False]
    assert "its reference could not be scored" in done.stdout
    assert len({folder for folder, _ in scorings(tmp_path)}) == 2


def test_an_interrupted_sweep_ends_its_processes_and_goes_on_later(tmp_path: Path, words: list[str]):
    sweep = [*words, "optim.lr=1e-3,2e-3"]
    process = subprocess.Popen([sys.executable, "-m", "dpo_dist.launcher.cli", *sweep], cwd=REPO,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "job 1 of 2 ended" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(60) == 130 and "interrupted; the same command goes on with what is missing" in rest
    jobs = summary(tmp_path)["jobs"]
    assert [job["done"] for job in jobs] == [True, False]
    assert not processes_on(Path(jobs[1]["run_dir"]))
    assert "1 are done, 1 to run" in dpo_dist(*sweep).stdout


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None,
                    reason="needs hydra-optuna-sweeper: pip install 'dpo-dist[sweep]'")
def test_optuna_searches_by_the_held_out_metric_and_survives_a_failed_run(tmp_path: Path, words: list[str]):
    done = dpo_dist(*words, "sweep=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2",
                    "cluster.jobs_at_once=2", "optim.lr=choice(1e-3,1e30)", code=1, timeout=600)
    shown = summary(tmp_path)
    assert {job["done"] for job in shown["jobs"]} == {True, False}
    assert {job["swept"]["optim.lr"] for job in shown["jobs"] if job["done"]} == {1e-3}
    best = max(job["metrics"]["rewards/accuracies"] for job in shown["jobs"] if job["done"])
    assert f"best_value: {best}" in (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert done.stdout.count("cached 0") == 1, "scored in the first round alone"
