"""Where several ranks fail at once, each node's person is told once, and what a lost rank did is said whatever gloo
calls it."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPO

from dpo_dist.config.compose import compose
from dpo_dist.run.provenance.made_by import version
from dpo_dist.runtime.process import _node_has_spoken
from dpo_dist.runtime.run_dir import FAILED, RunDir
from dpo_dist.runtime.world import lost_peer


@pytest.mark.parametrize(("node", "spoken"), [(0, True), (1, False)])
def test_a_rank_waits_for_the_message_of_the_first_to_fail(node: int, spoken: bool, tmp_path: Path):
    (tmp_path / FAILED).touch()                                   # made, and not yet written

    def write() -> None:
        time.sleep(0.2)
        (tmp_path / FAILED).write_text(json.dumps({"message": "m", "node": 0}))

    thread = threading.Thread(target=write)
    thread.start()
    assert _node_has_spoken(RunDir(tmp_path), node) == spoken
    thread.join()


def test_a_rank_that_never_says_what_was_wrong_has_not_spoken(tmp_path: Path):
    (tmp_path / FAILED).touch()
    assert not _node_has_spoken(RunDir(tmp_path), 0)


@pytest.mark.parametrize("words", [
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST, NumelIn=112, "
    "NumelOut=112, Timeout(ms)=30000) ran for 30011 milliseconds before timing out.",
    "NCCL communicator was aborted on rank 1.", "wait timeout after 30000ms, keys: /default_pg/0//cuda//1"])
def test_nccls_silence_is_told_with_the_limit_that_was_waited_for(words: str):
    cluster = compose(["model.path=m", "cluster.timeout_seconds=30"]).cluster
    assert "for 30 s (cluster.timeout_seconds)" in str(lost_peer(RuntimeError(words), cluster))


@pytest.mark.parametrize("words", [
    "NCCL error in: ProcessGroupNCCL.cpp:2027, remote process exited or there was a network error, NCCL version "
    "2.28.9\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\nLast "
    "error:\n"
    "socketProgress: Connection closed by remote peer node2<41234>",
    "recvValue failed on SocketImpl(fd=69): failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
    "server shutdown?"])
def test_a_lost_rank_is_told_by_all_names_that_nccl_and_the_store_have_for_it(words: str):
    cluster = compose(["model.path=m", "cluster.timeout_seconds=30"]).cluster
    assert "another rank closed its connection" in str(lost_peer(RuntimeError(words), cluster))


def test_a_lost_rank_is_told_by_all_names_that_gloo_has_for_it():
    cluster = compose(["model.path=m", "cluster.timeout_seconds=30"]).cluster
    for message in ("Timed out waiting 30000ms for send operation to complete",
                    "Application timeout caused pair closure"):
        assert "no answer from another rank for 30 s" in str(lost_peer(RuntimeError(message), cluster))
    assert "closed its connection" in str(lost_peer(RuntimeError("Connection closed by peer [10.0.0.1]:1"), cluster))
    assert lost_peer(RuntimeError("something else"), cluster) is None


def test_a_checkout_that_is_not_installed_has_a_passport_too():
    assert version("dpo-dist") != "" and version("no-such-package-anywhere") == "not installed"


@pytest.mark.parametrize("capture", ["1", "0"])
def test_print_reaches_the_terminal_when_asked(capture: str, tmp_path: Path):
    script = ("import sys\nfrom dpo_dist.runtime.ending import exit_with\n"
              "from dpo_dist.runtime.process import run_entry\n"
              "exit_with(run_entry(sys.argv[1:], lambda config, world, terminal: print('a look inside')))")
    done = subprocess.run([sys.executable, "-c", script, "model.path=m", "cluster.device=cpu",
                           f"run.dir={tmp_path / 'run'}"], env={**os.environ, "DPO_DIST_CAPTURE": capture}, cwd=REPO,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("a look inside" in done.stdout) == (capture == "0")
    assert ("a look inside" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()) == (capture == "1")
