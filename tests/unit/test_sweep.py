"""A sweep finds its runs again, scores only what must be scored apart, and says which run was best. Nothing is trained
here."""
from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.compose import compose, conf_dir
from dpo_dist.config.errors import UserError
from dpo_dist.launcher.sweep.groups import Job, group_jobs, make_job, reference_group, sweep_folder
from dpo_dist.launcher.sweep.multirun import multirun
from dpo_dist.launcher.sweep.processes import Command, places, run_commands
from dpo_dist.launcher.sweep.results import KL, Result, best, command_of, read_result, table, write_results

FIXED = ("model.path=m", "data.train=[{path: a}]", "data.eval_fraction=0.1")
KEYS = tuple(word.split("=")[0] for word in FIXED)


def job(*words: str, folder: str = "s") -> Job:
    return make_job([*FIXED, *words], KEYS, Path(folder))


def finish(j: Job, **metrics: float) -> Job:
    """Leaves in the job's folder what a finished run leaves there."""
    j.run_dir.mkdir(parents=True)
    (j.run_dir / "run.json").write_text(json.dumps({"identity_of": j.config.identity_dict()}))
    rows = [{"step": 0, "split": "eval", "loss": 0.7}, {"step": 4, "split": "eval", **metrics},
            {"step": 4, "split": "train", "loss": 0.1, "rewards/accuracies": 1.0}]
    (j.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (j.run_dir / "DONE").touch()
    return j


# ----------------------------------------------------------------------------------------------------- names of folders


def test_a_run_has_the_same_folder_however_its_number_is_written_and_another_where_what_is_trained_differs():
    assert job("optim.lr=5e-7").run_dir == job("optim.lr=0.0000005").run_dir == job("optim.lr=5e-07",
                                                                                    "cluster.jobs_at_once=2").run_dir
    assert job("optim.lr=5e-7").run_dir.name.startswith("lr_5e-07-")
    assert job("optim.lr=5e-7").run_dir != make_job([*FIXED, "optim.lr=5e-7", "train.seed=1"], (*KEYS, "train.seed"),
                                                    Path("s")).run_dir


def test_a_run_is_found_again_when_another_key_is_swept_too(tmp_path: Path):
    first = finish(make_job([*FIXED, "loss.beta=0.3", "optim.lr=1e-6"], [*KEYS, "optim.lr"], tmp_path), loss=0.5)
    again = job("loss.beta=0.3", "optim.lr=1e-6", folder=str(tmp_path))
    assert first.swept != again.swept and first.run_dir == again.run_dir and again.is_done()


def test_the_overrides_of_a_run_compose_to_its_config_in_its_folder_even_with_a_quote_in_the_name():
    for folder in ("s", "it's a = b, c"):
        j = job("loss.beta=0.3", "run.dir=elsewhere", "cluster.jobs_at_once=2", folder=folder)
        composed = compose(j.overrides)
        assert composed.run_dir == j.config.run_dir == str(j.run_dir)
        assert composed.identity() == j.config.identity()
        assert composed.cluster.jobs_at_once == 1


def test_the_sweeps_folder_depends_on_what_is_swept_and_trained_not_on_the_values_or_the_machine():
    one = sweep_folder([*FIXED, "loss.beta=0.1,0.2"], ["loss.beta"])
    assert one == sweep_folder(["loss.beta=0.1,0.2,0.3", *reversed(FIXED), "cluster.procs_per_node=4", "zero=zero2"],
                               ["loss.beta"])
    assert one != sweep_folder([*FIXED, "loss.beta=0.1,0.2", "train.epochs=2"], ["loss.beta"])
    assert one != sweep_folder([*FIXED, "loss.beta=0.1,0.2", "optim.lr=1,2"], ["loss.beta", "optim.lr"])


# ------------------------------------------------------------------------------------------------------------ grouping


def test_runs_share_a_scoring_whatever_does_not_change_the_references_log_probs():
    same = ["loss.beta=0.3", "optim.lr=1e-3", "loss=ipo", "train.seed=4", "train.epochs=3", "zero=zero2",
            "data.group_by_prompt=true", "data.cache_dir=x", "train.pairs_per_step=8"]
    plain = reference_group(job().config)
    assert {reference_group(job(word).config) for word in same} == {plain}
    other = ["reference.path=r", "model.dtype=bf16", "data.max_length=100", "data.truncation=keep_end",
             "reference.cache_dir=x", "reference=vllm"]
    assert len({reference_group(job(word).config) for word in other} | {plain}) == len(other) + 1
    lora, narrow = ["model.lora.rank=4"], ["model.lora.rank=4", "model.quantization=nf4"]
    assert reference_group(job(*lora).config) == plain != reference_group(job(*narrow).config)
    full = "reference.path=r"
    assert reference_group(job(*narrow, full).config) == reference_group(job(*lora, full).config)


@pytest.mark.parametrize("words", [["loss=simpo"], ["reference.mode=live"],
                                   ["reference=adapter_off", "model.lora.rank=4"]])
def test_a_run_that_needs_no_scoring_ahead_is_in_a_group_without_one(words: list[str]):
    groups = group_jobs([job(*words), job("loss.beta=0.2"), job("loss.beta=0.3")], Path("s"))
    assert [(group.score is None, len(group.jobs)) for group in groups] == [(True, 1), (False, 2)]


def test_a_group_is_scored_with_the_data_of_its_jobs_in_a_folder_of_its_own():
    (group,) = group_jobs([job("loss.beta=0.2"), job("loss.beta=0.3")], Path("s"))
    assert group.score is not None
    assert group.score.config.data == group.jobs[0].config.data
    assert group.score.run_dir not in {j.run_dir for j in group.jobs}
    assert compose(group.score.overrides).run_dir == str(group.score.run_dir)


# -------------------------------------------------------------------------------------------------------------- reruns


def test_only_a_finished_run_of_the_same_config_counts_as_done(tmp_path: Path):
    j = finish(job("loss.beta=0.2", folder=str(tmp_path)), loss=0.5)
    assert j.is_done()
    (j.run_dir / "DONE").unlink()
    assert not j.is_done()
    (j.run_dir / "DONE").touch()
    other = job("loss.beta=0.3", folder=str(tmp_path))
    (j.run_dir / "run.json").write_text(json.dumps({"identity_of": other.config.identity_dict()}))
    assert not j.is_done()


# ------------------------------------------------------------------------------------------------------------- results


def results(tmp_path: Path) -> list[Result]:
    """Two betas by two learning rates: one run failed, two are equally accurate."""
    jobs = [job(f"loss.beta={beta}", f"optim.lr={lr}", folder=str(tmp_path)) for beta in (0.1, 0.3)
            for lr in (1e-6, 1e-5)]
    for j, accuracy, kl in zip(jobs[:3], (0.6, 0.8, 0.8), (0.01, 0.3, 0.2), strict=True):
        finish(j, **{"loss": 0.5, "rewards/accuracies": accuracy, "rewards/margins": 0.1, KL: kl,
                     "reference/chosen_drift_per_token": -0.1})
    jobs[3].run_dir.mkdir()
    (jobs[3].run_dir / "FAILED").write_text(json.dumps({"message": "the loss <of> step 3 is not finite",
                                                        "exit_code": 1}))
    return [read_result(j) for j in jobs]


def test_of_equally_good_runs_the_one_closest_to_the_reference_is_best(tmp_path: Path):
    found = best(results(tmp_path), "rewards/accuracies")
    assert found is not None and found.metrics[KL] == 0.2
    lowest = [Result(job("loss.beta=0.2"), True, {"loss": loss, "rewards/margins": loss}) for loss in (0.6, 0.4, 0.5)]
    assert best(lowest, "loss") == lowest[1] and best(lowest, "rewards/margins") == lowest[0]
    assert best([Result(job("loss.beta=0.2"), True, {"rewards/accuracies": math.nan})], "rewards/accuracies") is None


def test_the_summary_has_every_run_why_one_failed_and_the_best_ones_command(tmp_path: Path):
    found = results(tmp_path)
    write_results(tmp_path, found, "rewards/accuracies")
    summary = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["done"] for entry in summary["jobs"]] == [True, True, True, False]
    assert summary["jobs"][3]["message"] == "the loss <of> step 3 is not finite"
    assert summary["jobs"][1]["metrics"]["rewards/accuracies"] == 0.8, (
        "the last held-out row, not the first and not a training row")
    assert summary["best"]["swept"] == {"loss.beta": 0.3, "optim.lr": 1e-6}
    assert "loss.beta=0.3" in summary["best"]["command"] and "run.dir" not in summary["best"]["command"]
    assert summary["best"]["config"]["loss"]["beta"] == 0.3
    assert summary["best"]["command"] == command_of(found[2].job)
    lines = table(found).splitlines()
    assert lines[0].split() == ["loss.beta", "optim.lr", "accuracy", "margin", "KL", "estimate", "chosen", "drift",
                                "loss"]
    assert lines[4].split() == ["0.3", "1e-05", "-", "-", "-", "-", "-", "failed"]


def test_the_report_is_made_of_what_the_sweep_writes_and_one_that_fails_changes_no_exit_code(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for beta, accuracy in ((0.1, 0.6), (0.3, 0.8)):
        finish(job(f"loss.beta={beta}", folder=str(tmp_path)), **{"rewards/accuracies": accuracy})
    rerun(tmp_path, "loss.beta=0.1,0.3")
    assert "loss.beta=0.3" in (tmp_path / "report.html").read_text()
    assert f"{tmp_path}/report.html and sweep.json hold all of it" in capfd.readouterr().out
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()                   # nothing can be written under its name
    rerun(tmp_path, "loss.beta=0.1,0.3")
    told = capfd.readouterr()
    assert f"{tmp_path}/sweep.json holds all of it" in told.out and "the report cannot be written" in told.err


# ------------------------------------------------------------------------------------------------- places and processes


def test_devices_are_divided_among_the_jobs_that_run_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,6,7,")
    cluster = job("cluster.jobs_at_once=2").config.cluster
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(cluster)] == ["4,5", "6,7"]
    with pytest.raises(UserError, match=r"cluster\.jobs_at_once=3 does not divide the 4 devices"):
        places(job("cluster.jobs_at_once=3").config.cluster)
    with pytest.raises(UserError, match=r"cluster\.procs_per_node=4 is more than each job's share of 2 devices"):
        places(job("cluster.jobs_at_once=2", "cluster.procs_per_node=4").config.cluster)


def test_one_failed_command_does_not_stop_the_others_and_no_more_run_at_once_than_there_are_places():
    going, most = set[int](), 0
    ends: dict[int, int] = {}

    def began(i: int) -> None:
        nonlocal most
        going.add(i)
        most = max(most, len(going))

    def ended(i: int, code: int, seconds: float) -> None:
        going.remove(i)
        ends[i] = code

    codes = run_commands([Command(("--help",)), Command(("nonsense",)), Command(("--help",))], [{}, {}], began, ended)
    assert codes == [0, 2, 0] and ends == {0: 0, 1: 2, 2: 0}
    assert most == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_start_loses_no_process(number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Command, place: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import sys, time; sys.exit(time.sleep(2))"]))
        os.kill(os.getpid(), number)
        return started[-1]

    monkeypatch.setattr("dpo_dist.launcher.sweep.processes._start", start)
    # a test run in the background ignores SIGINT, and so it would stay
    inherited = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_commands([Command(("--help",)), Command(("--help",))], [{}])
        assert [process.poll() for process in started] == [-signal.SIGTERM if number == signal.SIGTERM
                                                           else 0], "waited for, none after it"
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, inherited)


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "loss.beta=-1.0 must be greater than 0": ["loss.beta=0.1,-1"],
    "unknown key 'loss.bta': did you mean 'loss.beta'": ["loss.bta=0.1,0.2"],
    "loss=ippo is not a choice: did you mean 'ipo'": ["loss=dpo,ippo"],
    "-m without a key of several values sweeps nothing": ["loss.beta=0.1"],
    "sweep=beta is not a choice: did you mean 'beta_lr'": ["sweep=beta"],
    "cluster.nodes cannot be swept": ["cluster.nodes=1,2"],
    "run.dir cannot be swept": ["run.dir=a,b"],
    "zero.stage cannot be swept: zero.stage=2 and zero.stage=3 train the same thing": ["zero.stage=2,3",
                                                                                       "optim.lr=1e-6"],
    "train.tokens_per_microbatch cannot be swept": ["train.tokens_per_microbatch=1000,2000", "optim.lr=1e-6,1e-5"],
    "tracking cannot be swept": ["tracking=none,wandb"],
    "hydra.launcher.objective=los is not allowed: did you mean 'loss'": ["loss.beta=0.1,0.2",
                                                                         "hydra.launcher.objective=los"],
    "hydra.launcher.objective=rewards/accuracies is not measured with loss.name=sft": ["loss=sft",
                                                                                       "optim.lr=1e-6,1e-5"],
    "export.push_to_hub=me/it: the runs of a sweep would overwrite": [
        "loss.beta=0.1,0.2", "export.push_to_hub=me/it", "run.offline=false"],
    "leave no held-out pairs to compare the runs of a sweep by": ["loss.beta=0.1,0.2", "data.eval_fraction=0"],
    "cannot read the override 'loss.beta=[0.1,'": ["loss.beta=[0.1,"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_sweep_is_one_message_before_anything_is_started(message: str, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in FIXED if word.split("=")[0] not in {w.split("=")[0] for w in MISTAKES[message]}]
    with pytest.raises(UserError, match=re.escape(message)) as found:
        multirun([*words, *MISTAKES[message]])
    assert "\n" not in str(found.value)


def test_a_mistake_in_a_sweep_is_answered_without_torch(tmp_path: Path):
    script = ("import sys; from dpo_dist.launcher.cli import main; code = main(sys.argv[1:]); assert 'torch' not in "
              "sys.modules; sys.exit(code)")
    words = ["run", "-m", *FIXED, "loss.beta=0.05,0.1,0.3,-1", "optim.lr=5e-7,1e-6"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: loss.beta=-1.0 must be greater than 0\n")


@pytest.mark.parametrize("words", [["train", "-m", "loss.beta=1,2"], ["run", "sweep=beta_lr"],
                                   ["run", "cluster.jobs_at_once=2"]])
def test_what_belongs_to_a_sweep_is_refused_elsewhere(words: list[str], capsys: pytest.CaptureFixture[str]):
    from dpo_dist.launcher.cli import main

    assert main([words[0], "model.path=m", *words[1:]]) == 2
    assert words[1].split("=")[0] in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- Hydra and its sweepers


def test_a_dry_run_shows_one_scoring_job_and_one_array_and_leaves_no_job(tmp_path: Path,
                                                                         capsys: pytest.CaptureFixture[str]):
    words = ["loss.beta=0.05,0.1,0.3", "optim.lr=5e-7,1e-6", f"run.dir={tmp_path / 'sweep'}"]
    assert multirun([*FIXED, *words, "cluster=slurm"], dry_run=True) == 0
    shown = capsys.readouterr().out
    assert shown.count("--array=0-5") >= 1 and "afterok" in shown
    assert not list((tmp_path / "sweep").glob("*/"))
    with pytest.raises(UserError, match="set cluster=slurm"):
        multirun([*FIXED, *words], dry_run=True)


def test_the_runs_of_a_sweep_read_an_experiment_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text("optim:\n  weight_decay: 0.25\n")
    words = [*FIXED, f"experiment={tmp_path / 'mine.yaml'}", "loss.beta=0.1,0.2", f"run.dir={tmp_path / 'sweep'}",
             "cluster=slurm"]
    assert multirun(words, dry_run=True) == 0
    assert capsys.readouterr().out.count(f"experiment={tmp_path / 'mine.yaml'}") >= 2



def rerun(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """What the jobs of a sweep differ in, by sweep.json; all of them must have been left in tmp_path as done."""
    assert multirun([*FIXED, f"run.dir={tmp_path}", *words]) == 0
    return [entry["swept"] for entry in json.loads((tmp_path / "sweep.json").read_text())["jobs"]]


def test_every_combination_is_a_job_whether_swept_by_hand_or_by_a_ready_made_space(tmp_path: Path,
                                                                                   capsys: pytest.CaptureFixture[str]):
    grid = [{"loss.beta": beta, "optim.lr": lr} for beta in (0.05, 0.1, 0.3) for lr in (5e-7, 1e-6)]
    for values in grid:
        finish(job(*(f"{key}={value}" for key, value in values.items()), folder=str(tmp_path)),
               **{"rewards/accuracies": values["loss.beta"]})
    assert rerun(tmp_path, "loss.beta=0.05,0.1,0.3", "optim.lr=5e-7,1e-6") == grid
    assert "6 are done, 0 to run" in capsys.readouterr().out
    assert rerun(tmp_path, "sweep=beta_lr") == grid
    assert "best by held-out rewards/accuracies: loss.beta=0.3 optim.lr=5e-07" in capsys.readouterr().out


def test_a_group_of_the_config_can_be_swept_and_so_can_a_list(tmp_path: Path):
    for words in (["loss=dpo"], ["loss=ipo"], ["optim.betas=[0.9,0.95]"], ["optim.betas=[0.9,0.98]"]):
        finish(job(*words, folder=str(tmp_path)), **{"rewards/accuracies": 0.5})
    assert rerun(tmp_path, "loss=dpo,ipo") == [{"loss": "dpo"}, {"loss": "ipo"}]
    assert rerun(tmp_path, "optim.betas=[0.9,0.95],[0.9,0.98]") == [{"optim.betas": "[0.9,0.95]"},
                                                                    {"optim.betas": "[0.9,0.98]"}]


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None,
                    reason="needs hydra-optuna-sweeper: pip install 'dpo-dist[sweep]'")
def test_optuna_is_told_the_objective_of_each_job_and_of_one_proposed_twice(tmp_path: Path):
    for beta, accuracy in ((0.1, 0.6), (0.2, 0.9)):
        finish(job(f"loss.beta={beta}", "optim.lr=1e-6", folder=str(tmp_path)), **{"rewards/accuracies": accuracy})
    swept = rerun(tmp_path, "sweep=optuna", "hydra.sweeper.n_trials=14", "optim.lr=1e-6", "loss.beta=choice(0.1,0.2)")
    assert sorted(entry["loss.beta"] for entry in swept) == [0.1, 0.2]
    summary = (tmp_path / "optimization_results.yaml").read_text()
    assert "best_value: 0.9" in summary and "loss.beta: 0.2" in summary


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None,
                    reason="needs hydra-optuna-sweeper: pip install 'dpo-dist[sweep]'")
def test_a_search_in_the_wrong_direction_is_refused():
    with pytest.raises(UserError, match=r"hydra\.sweeper\.direction=maximize is the wrong way for "
                                        r"hydra\.launcher\.objective=loss"):
        multirun([*FIXED, "sweep=optuna", "hydra.launcher.objective=loss"])


def test_without_optuna_the_person_is_told_what_to_install():
    script = f"""import sys
sys.modules["hydra_plugins.hydra_optuna_sweeper"] = None      # as if it were not installed
from dpo_dist.launcher.cli import main
sys.exit(main(["run", "-m", "sweep=optuna", *{FIXED}]))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: the Optuna sweeper is not installed; run: pip install 'dpo-dist[sweep]'" in done.stderr


def test_every_ready_made_space_says_how_to_run_it():
    for path in (conf_dir() / "sweep").glob("*.yaml"):
        assert f"dpo-dist run -m sweep={path.stem}" in path.read_text()
