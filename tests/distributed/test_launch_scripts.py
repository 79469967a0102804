"""launch/ by hand: torchrun.sh on one box, hosts.sh on several, here two that are this one; a remote shell that is a
local one."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, metrics, processes_on, steps_logged, train_on, wait_until, write_rows, write_tiny_llama

from dpo_dist.runtime.ports import free_port

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 500, longest=80)
    return [f"model.path={tmp_path / 'm'}", *(word for word in base if not word.startswith("cluster.procs")),
            train_on(tmp_path / "rows.jsonl"), "train.pairs_per_step=12", "train.max_steps=200", "train.epochs=100",
            "optim.lr=1e-3", f"run.dir={tmp_path / 'a run'}"]


def start(script: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """As from a terminal, where Ctrl-C is heard: a job that a shell starts in the background has it ignored, and so
    have its children."""
    return subprocess.Popen([str(REPO / "launch" / script), *words], cwd=REPO, start_new_session=True, text=True,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "PYTHON": sys.executable,
                                                           "OMP_NUM_THREADS": "1", **environment},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def interrupt_after_a_step(process: subprocess.Popen[str], run_dir: Path) -> str:
    """What it printed, after a Ctrl-C in its terminal."""
    wait_until(lambda: steps_logged(run_dir) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)[0]


def test_torchrun_sh_trains_on_one_box_and_ctrl_c_saves(tmp_path: Path, words: list[str]):
    process = start("torchrun.sh", *words, PROCS_PER_NODE="2", MASTER_PORT=str(free_port()))
    shown = interrupt_after_a_step(process, tmp_path / "a run")
    assert "stopped by SIGINT: step" in shown and process.returncode != 0
    assert list((tmp_path / "a run" / "checkpoints").glob("*/COMPLETE")) and (tmp_path / "a run" / "PREEMPTED").exists()
    assert (tmp_path / "a run" / "logs" / "rank-1.log").exists()


def test_hosts_sh_starts_a_node_on_every_host_and_ctrl_c_saves_on_all(tmp_path: Path, words: list[str]):
    """Each node hears it once: a second Ctrl-C would have killed it, step and all, and this one's steps are longer than
    a call."""
    words = [*words, "train.pairs_per_step=400", "train.tokens_per_microbatch=400"]
    (tmp_path / "hosts").write_text("127.0.0.1  # node 0\n\n127.0.0.1\n")
    remote = tmp_path / "remote"
    remote.write_text('#!/bin/bash\nexec setsid --wait env --default-signal=INT bash -c "$2"\n')
    remote.chmod(0o755)
    process = start("hosts.sh", str(tmp_path / "hosts"), *words, PROCS_PER_NODE="1", MASTER_PORT=str(free_port()),
                    REMOTE=str(remote))
    shown = interrupt_after_a_step(process, tmp_path / "a run")
    assert "stopped by SIGINT: step" in shown and process.returncode == 128 + signal.SIGINT
    assert {p.name for p in (tmp_path / "a run" / "logs").glob("node-*.log")} == {"node-0.log", "node-1.log"}
    assert list((tmp_path / "a run" / "checkpoints").glob("*/COMPLETE"))


def test_hosts_sh_goes_on_with_the_hosts_that_still_answer_when_one_is_gone(tmp_path: Path, words: list[str]):
    run_dir = tmp_path / "a run"
    (tmp_path / "hosts").write_text("first\nsecond\n")
    remote = tmp_path / "remote"                         # a host that is gone kills what it runs, and takes no call
    remote.write_text(f"""#!/bin/bash
[ -e {tmp_path}/gone-$1 ] && exit 255
setsid bash -c "$2" & wait $! || code=$?
[ -e {tmp_path}/gone-$1 ] && exit 255
exit ${{code:-0}}
""")
    remote.chmod(0o755)
    process = start("hosts.sh", str(tmp_path / "hosts"), *words, "cluster.max_restarts=1", "train.max_steps=30",
                    "train.save_every_steps=1", PROCS_PER_NODE="1", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(free_port()), REMOTE=str(remote), MIN_NODES="1")
    wait_until(lambda: steps_logged(run_dir) >= 3, process)
    (tmp_path / "gone-second").touch()
    for pid in processes_on(run_dir):
        if {b"RANK=1", b"NODE_RANK=1"} & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            os.kill(pid, signal.SIGKILL)
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and (run_dir / "DONE").exists(), shown
    assert "restart 1 of 1, from step-0000" in shown and ", on first\n" in shown, shown
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 31))
    assert json.loads((run_dir / "run.json").read_text())["passport"]["ranks"] == 1


def test_a_node_that_knows_no_master_says_so(words: list[str]):
    process = start("node.sh", *words, NNODES="2", NODE_RANK="0")
    assert "error: MASTER_ADDR is not set" in process.communicate(timeout=30)[0] and process.returncode == 2


def test_a_node_that_is_told_to_end_while_its_ranks_begin_leaves_none(tmp_path: Path):
    """Nobody else would end them: the other node is never started, and they wait for it."""
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'dpo_dist.train' in sys.orig_argv: "
                                               "os.kill(os.getppid(), 15)\n")
    process = start("node.sh", "model.path=m", f"run.dir={tmp_path / 'run'}", NNODES="2", NODE_RANK="0",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RUN_DIR=str(tmp_path / "run"),
                    PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO)]))
    shown = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "ended by SIGTERM before the ranks of node 0 had begun" in shown
    assert not processes_on(tmp_path / "run")


def test_a_node_that_saved_after_a_signal_has_not_failed(tmp_path: Path, words: list[str]):
    """srun ends all nodes where one ends with another code than 0."""
    process = start("torchrun.sh", *words, "cluster.procs_per_node=2", MASTER_PORT=str(free_port()))
    wait_until(lambda: steps_logged(tmp_path / "a run") >= 2, process)
    assert (tmp_path / "a run" / "logs" / "rank-1.log").exists(), "two processes, as the config says"
    process.send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1: step" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_a_second_ctrl_c_ends_a_node_at_once(tmp_path: Path):
    """This one is at work and does not heed the first; the other node is never started."""
    (tmp_path / "heedless.py").write_text("""import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
for _ in range(2):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1)
time.sleep(600)
""")
    process = start("node.sh", "model.path=m", f"run.dir={tmp_path / 'run'}", NNODES="2", NODE_RANK="0",
                    MASTER_ADDR="127.0.0.1", MODULE="heedless", RUN_DIR=str(tmp_path / "run"),
                    PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO)]))
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT and "ended by SIGINT at once" in shown
    assert not processes_on(tmp_path / "run")


def test_a_node_whose_folder_cannot_be_made_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    process = start("node.sh", "model.path=m", RUN_DIR=str(tmp_path / "file" / "run"))
    shown = process.communicate(timeout=30)[0]
    assert process.returncode == 2 and "Traceback" not in shown
    assert "cannot be made" in shown and "set run.dir to" in shown


@pytest.mark.parametrize("code", [1, 127, 137, 255])
def test_hosts_sh_fails_when_a_host_does_whatever_its_code(code: int, tmp_path: Path):
    """ssh ends with 255 where it cannot connect, with 127 where there is no such command, and with 137 where that was
    killed."""
    (tmp_path / "hosts").write_text("first\nsecond\nthird\n")
    remote = tmp_path / "remote"
    remote.write_text(f"#!/bin/bash\n[ $1 != second ] || exit {code}\n")
    remote.chmod(0o755)
    process = start("hosts.sh", str(tmp_path / "hosts"), RUN_DIR=str(tmp_path), REMOTE=str(remote),
                    MAX_RESTARTS="0")
    assert process.communicate(timeout=60)[0] == "" and process.returncode == code
