"""One run on two machines (network namespaces): the same numbers as on one, and no endless wait when a machine is
lost."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, dpo_dist, metrics, steps_logged, train_on, wait_until, write_rows, write_tiny_llama
from namespaces import Node, two_nodes

from dpo_dist.runtime.ports import free_port

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 30                 # where a node is lost
BIN = Path(sys.executable).parent


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as both:
        yield both


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 40)
    base = [word for word in base if not word.startswith(("cluster.procs_per_node", "cluster.timeout"))]
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "cluster.timeout_seconds=60",
            "data.eval_fraction=0.2", "train.pairs_per_step=8", "optim.lr=1e-3", "loss.beta=0.5", "zero=zero3"]


def environment(rank: int, processes: int) -> dict[str, str]:
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1", "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "node-0",
            "MASTER_PORT": "29500", "PROCS_PER_NODE": str(processes), "GLOO_SOCKET_IFNAME": "eth0"}


def run_on(nodes: tuple[Node, Node], words: list[str], folder: Path, processes: int) -> list[subprocess.Popen[str]]:
    return [node.start([REPO / "launch" / "node.sh", *words], environment(rank, processes), folder)
            for rank, node in enumerate(nodes)]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit code, output) of each, all waited for."""
    deadline = time.monotonic() + timeout
    shown = [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, shown, strict=True)]


def test_two_nodes_give_the_losses_of_one_node_with_as_many_processes(
        nodes: tuple[Node, Node], tmp_path: Path, words: list[str]):
    processes, words = 2, [*words, "train.max_steps=4"]
    for code, shown in finish(run_on(nodes, [*words, f"run.dir={tmp_path / 'two'}"], tmp_path, processes)):
        assert code == 0, shown
    dpo_dist("train", *words, f"cluster.procs_per_node={2 * processes}", f"run.dir={tmp_path / 'one'}")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["passport"]["ranks"] == 2 * processes
    for split in ("train", "eval"):
        two, one = metrics(tmp_path / "two", split), metrics(tmp_path / "one", split)
        assert [row["step"] for row in two] == [row["step"] for row in one] == {"train": [1, 2, 3, 4],
                                                                                "eval": [0, 4]}[split]
        for a, b in zip(two, one, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
            assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-6)


def test_when_a_node_is_cut_off_the_job_ends_within_the_timeout_and_says_so(
        nodes: tuple[Node, Node], tmp_path: Path, words: list[str]):
    run_dir = tmp_path / "run"
    jobs = run_on(nodes, [*words, f"cluster.timeout_seconds={TIMEOUT_SECONDS}", "train.epochs=500",
                          f"run.dir={run_dir}"], tmp_path, 1)
    wait_until(lambda: steps_logged(run_dir) >= 2, *jobs)
    nodes[0].cut_off()                                            # the one that the others meet at
    began = time.monotonic()
    ended = finish(jobs, timeout=TIMEOUT_SECONDS + 90)
    assert time.monotonic() - began < TIMEOUT_SECONDS + 60, ended
    for code, shown in ended:                                     # each node has a terminal of its own
        assert code != 0
        assert f"no answer from another rank for {TIMEOUT_SECONDS} s (cluster.timeout_seconds)" in shown, shown
    assert not (run_dir / "DONE").exists()


@pytest.mark.parametrize("key", ["data.cache_dir", "run.dir"])
def test_a_folder_that_the_nodes_do_not_share_is_named_on_both_before_any_work(
        key: str, tmp_path: Path, words: list[str]):
    shared = [word for word in [*words, f"run.dir={tmp_path / 'run'}"] if not word.startswith(key)]
    port = str(free_port())
    jobs = []
    # a relative path, and nodes that stand in different folders
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
        jobs.append(subprocess.Popen(
            [REPO / "launch" / "node.sh", *shared, f"{key}=relative"], cwd=tmp_path / f"node-{rank}", text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, **environment(rank, 1), "MASTER_ADDR": "127.0.0.1",
                                           "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}))
    for code, shown in finish(jobs):
        assert code != 0
        assert f"error: {key}=relative is not one folder for all ranks" in shown, shown
        assert f"{tmp_path / 'node-1' / 'relative'} on {socket.gethostname()}" in shown
        assert f"set {key} to the absolute path of a folder that every node mounts" in shown
    assert not list(tmp_path.rglob(".seen-by-all-*"))
    assert not list(tmp_path.rglob("meta.json")), "nothing was tokenized"
