"""A run that is told to end saves, says so, and goes on later as if nothing had happened; a rank that dies ends the job
at once."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import (
    REPO,
    dpo_dist,
    model_digest,
    process_of_rank,
    processes_on,
    start,
    steps_logged,
    train_on,
    wait_until,
    write_rows,
    write_tiny_llama,
)

from dpo_dist.launcher.plan import Stage
from dpo_dist.launcher.ranks import Place, Ranks, Work
from dpo_dist.runtime.run_dir import RunDir

pytestmark = pytest.mark.distributed

STEPS = 40                           # of a run that is long enough to be stopped


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=128)
    write_rows(tmp_path / "rows.jsonl", 100, longest=80)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "cluster.procs_per_node=2",
            "train.pairs_per_step=10", f"train.max_steps={STEPS}", "optim.lr=1e-3", "train.tokens_per_microbatch=600"]


def fresh(*words: object) -> subprocess.Popen[str]:
    """The command as a person starts it, imports and all, in a terminal where Ctrl-C is heard: a job that a shell
    starts in the background has it ignored, and so have its children."""
    return subprocess.Popen([sys.executable, "-m", "dpo_dist.launcher.cli", *map(str, words)], cwd=REPO,
                            start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def gone(run_dir: Path) -> None:
    """Waits until no process of the run is left."""
    wait_until(lambda: not processes_on(run_dir), what="its ranks are left behind", seconds=30)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_told_to_end_saves_first_and_goes_on_to_the_very_bits(
        sent: signal.Signals, tmp_path: Path, words: list[str]):
    begin = fresh if sent == signal.SIGINT else start
    process = begin("run", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    os.killpg(process.pid, sent)                          # as a terminal does it: to the whole foreground group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, err
    marker = json.loads((tmp_path / "run" / "PREEMPTED").read_text())
    assert marker["signal"] == sent and marker["message"] in out
    last = steps_logged(tmp_path / "run")
    assert last < STEPS and f"step {last} of {STEPS} is saved" in out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    assert not (tmp_path / "run" / "FAILED").exists() and not processes_on(tmp_path / "run")

    assert f"resumed from step-{last:06d}" in dpo_dist("run", *words, f"run.dir={tmp_path / 'run'}").stdout
    assert not (tmp_path / "run" / "PREEMPTED").exists() and (tmp_path / "run" / "DONE").exists()
    if sent == signal.SIGINT:
        dpo_dist("run", *words, f"run.dir={tmp_path / 'straight'}")
        assert model_digest(tmp_path / "run") == model_digest(tmp_path / "straight")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, words: list[str]):
    process = start("train", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 1, process)
    os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGSTOP)    # so the step never ends
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the first waits for the step"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT
    gone(tmp_path / "run")


def test_a_rank_that_is_stopped_for_good_is_given_up_though_no_other_waits_for_it(tmp_path: Path, words: list[str]):
    words = [*words, "zero=none", "cluster.procs_per_node=1", "train.max_steps=400", "cluster.timeout_seconds=3",
             f"run.dir={tmp_path / 'run'}"]
    process = start("train", *words)
    wait_until(lambda: steps_logged(tmp_path / "run") >= 1, process)
    (rank,) = set(processes_on(tmp_path / "run")) - {process.pid}
    os.kill(rank, signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: rank 0 was stopped (SIGSTOP), and nothing woke it for 6 s (twice cluster.timeout_seconds)" in err
    gone(tmp_path / "run")


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path, words: list[str]):
    process = start("train", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 1, process)
    process.kill()
    gone(tmp_path / "run")
    last = steps_logged(tmp_path / "run")
    assert 0 < last < STEPS and [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:06d}"]


def test_scoring_that_is_told_to_end_keeps_what_is_scored_and_the_training_does_not_start(tmp_path: Path,
                                                                                          words: list[str]):
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    write_rows(tmp_path / "rows.jsonl", 600, longest=100)
    process = start("run", *words, f"run.dir={tmp_path / 'run'}", "train.tokens_per_microbatch=320")
    wait_until(lambda: any((tmp_path / "reference").glob("*/*.safetensors")), process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    kept = int(re.search(r"(\d+) sequences are scored", out)[1])
    assert 0 < kept < 1200 and (tmp_path / "run" / "PREEMPTED").exists() and not (tmp_path / "run"
                                                                                  / "metrics.jsonl").exists()
    assert f"scored {1200 - kept}, cached {kept}" in dpo_dist("score", *words, f"run.dir={tmp_path / 'run'}").stdout


def test_a_rank_that_dies_ends_the_job_at_once_and_the_last_lines_of_its_log_are_shown(tmp_path: Path,
                                                                                       words: list[str]):
    process = start("train", *words, f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    with (tmp_path / "run" / "logs" / "rank-1.log").open("a") as log:
        log.write("the last words of rank 1\n")
    os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGKILL)
    died = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - died < 30
    assert "the last words of rank 1" in err and "error: rank 1 was ended by SIGKILL" in err
    assert json.loads((tmp_path / "run" / "FAILED").read_text())["message"].startswith("rank 1 was ended")
    assert not processes_on(tmp_path / "run")


def test_a_run_whose_ranks_are_killed_goes_on_by_itself_to_the_very_bits(tmp_path: Path, words: list[str]):
    words = [*words, "cluster.max_restarts=1", "train.save_every_steps=1"]
    process = start("run", *words, f"run.dir={tmp_path / 'run'}")
    for rank, done in ((1, 2), (0, 20)):
        wait_until(lambda done=done: steps_logged(tmp_path / "run") >= done, process)
        os.kill(process_of_rank(rank, tmp_path / "run"), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "run" / "DONE").exists(), err
    for rank in (1, 0):                                   # each time a newer checkpoint: the count begins anew
        assert re.search(rf"rank {rank} was ended by SIGKILL .*; restart 1 of 1, from step-0", err), err
    assert out.count("resumed from step-") == 2 and not (tmp_path / "run" / "FAILED").exists()
    dpo_dist("run", *words, f"run.dir={tmp_path / 'straight'}")
    assert model_digest(tmp_path / "run") == model_digest(tmp_path / "straight")


# ----------------------------------------------------------------------- signals at awkward moments, of stages in short


def run_stages(folder: Path, *stages: Stage, max_restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """`run_stages` of these in a process of its own. Their modules, and a sitecustomize for all processes, are looked
    for in `folder`."""
    script = f"""import sys
from dpo_dist.launcher.local import run_stages
from dpo_dist.launcher.plan import LaunchPlan, Stage
sys.exit(run_stages(LaunchPlan({str(folder / 'run')!r}, {stages!r}), {max_restarts}))"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, input="y\n",
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPO)])})


def test_a_killed_rank_is_named_though_another_one_is_found_gone_in_the_same_look(tmp_path: Path):
    (tmp_path / "fall.py").write_text("""import os, signal, subprocess, sys, time
print("time : 0.3", file=sys.stderr)                      # as libraries do, into the same log
if os.environ["RANK"] == "1":
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
os.kill(os.getppid(), signal.SIGSTOP)                     # the supervisor looks again when both are gone
subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getppid()}"], start_new_session=True)
time.sleep(2)
os._exit(1)
""")
    done = run_stages(tmp_path, Stage("train", "fall", 1, 2, ()))
    assert done.returncode == 1 and "error: rank 1 was ended by SIGKILL" in done.stderr, done.stderr


def test_a_signal_that_a_stage_no_longer_heeds_starts_no_further_stage(tmp_path: Path):
    (tmp_path / "over.py").write_text("import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.kill(os.getppid(), "
                                      "15)\n")
    (tmp_path / "further.py").write_text(f"open({str(tmp_path / 'begun')!r}, 'w')\n")
    done = run_stages(tmp_path, Stage("score", "over", 1, 1, ()), Stage("train", "further", 1, 1, (), after=("score",)))
    assert done.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM before the train stage" in done.stderr, done.stderr
    assert not (tmp_path / "begun").exists()


def test_a_signal_while_ranks_begin_ends_them(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'forever' in sys.orig_argv: os.kill(os.getppid(), "
                                               "15)\n")
    (tmp_path / "forever.py").write_text("import time\ntime.sleep(600)\n")
    done = run_stages(tmp_path, Stage("train", "forever", 1, 2, (f"run.dir={tmp_path / 'run'}",)))
    assert done.returncode == 128 + signal.SIGTERM and "ended by SIGTERM in the train stage" in done.stderr, done.stderr
    assert not processes_on(tmp_path / "run") and not (tmp_path / "run" / "FAILED").exists()
    assert json.loads((tmp_path / "run" / "PREEMPTED").read_text())["signal"] == signal.SIGTERM


@pytest.mark.parametrize(("fault", "starts", "code"), [
    ("raise SystemExit(1)", 3, 1),
    ("os.kill(os.getpid(), signal.SIGKILL)", 3, 1),
    ("raise SystemExit(2)", 1, 2),                                                       # a user's mistake
    ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.5); raise SystemExit(1)", 1, 128 + signal.SIGTERM),
])
def test_a_fault_that_comes_back_at_once_ends_the_run_when_its_restarts_are_used_up(
        fault: str, starts: int, code: int, tmp_path: Path):
    (tmp_path / "broken.py").write_text("import os, signal, time\n"
                                        f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n"
                                        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{fault}\n")
    done = run_stages(tmp_path, Stage("train", "broken", 1, 1, ()), max_restarts=2)
    assert done.returncode == code, done.stderr
    assert len((tmp_path / "starts").read_text()) == starts
    assert ("restart 2 of 2, from the start" in done.stderr) == (starts == 3)


def test_when_a_rank_fails_the_others_say_where_they_are_before_they_are_ended(tmp_path: Path):
    (tmp_path / "uneven.py").write_text("""import os, time
def where_it_waits(): time.sleep(600)
if os.environ["RANK"] == "0":
    where_it_waits()
time.sleep(1)
os._exit(1)
""")
    assert run_stages(tmp_path, Stage("train", "uneven", 1, 2, ())).returncode == 1
    assert "uneven.py\", line 2 in where_it_waits" in (tmp_path / "run" / "logs" / "launcher.log").read_text()


def test_ranks_have_no_standard_input(tmp_path: Path):
    (tmp_path / "asks.py").write_text("import sys\nsys.exit(len(sys.stdin.read()))\n")
    assert run_stages(tmp_path, Stage("train", "asks", 1, 1, ())).returncode == 0


def test_ranks_are_ended_where_one_more_cannot_be_started(tmp_path: Path):
    """They would wait for it, and nobody would know of them."""
    @dataclass(frozen=True)
    class NoMemoryForTwo(Place):
        def environment(self, local_rank: int) -> dict[str, str]:
            if local_rank == 1:
                raise OSError("Cannot allocate memory")
            return super().environment(local_rank)

    (tmp_path / "forever.py").write_text("import time\ntime.sleep(600)\n")
    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Ranks(Work("train", "forever", (f"run.dir={run_dir.path}",), run_dir, run_dir.launcher_log, NoMemoryForTwo(2),
                   {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}))
    gone(run_dir.path)


def test_what_was_started_beside_a_stage_that_cannot_be_started_is_ended(tmp_path: Path):
    (tmp_path / "forever.py").write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "run").write_text("a file where a folder should be")
    beside = Stage("score", "forever", 1, 1, (f"run.dir={tmp_path / 'beside'}",), beside="train",
                   run_dir=str(tmp_path / "beside"))
    done = run_stages(tmp_path, beside, Stage("train", "forever", 1, 1, ()))
    assert done.returncode == 1 and "UserError: run.dir=" in done.stderr, done.stderr
    assert (tmp_path / "beside" / "logs" / "launcher.log").exists() and not processes_on(tmp_path / "beside")
