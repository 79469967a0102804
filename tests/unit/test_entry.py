"""Where several ranks fail at once, each node's person is told once, and what a lost rank did is said whatever gloo calls it."""
from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from dpo_dist.compose import compose
from dpo_dist.entry import FAILED, _spoken_here
from dpo_dist.world import lost_peer


@pytest.mark.parametrize(("group", "spoken"), [("0", True), ("1", False)])
def test_a_rank_waits_for_the_message_of_the_first_to_fail(group: str, spoken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GROUP_RANK", group)
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / FAILED).touch()                                   # made, and not yet written

    def write() -> None:
        time.sleep(0.2)
        (tmp_path / FAILED).write_text(json.dumps({"message": "m", "node": 0}))

    thread = threading.Thread(target=write)
    thread.start()
    assert _spoken_here(tmp_path) == spoken
    thread.join()


def test_a_rank_that_never_says_what_was_wrong_has_not_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / FAILED).touch()
    assert not _spoken_here(tmp_path)


def test_a_lost_rank_is_told_by_all_names_that_gloo_has_for_it():
    cluster = compose(["model.path=m", "cluster.timeout_seconds=30"]).cluster
    for said in ("Timed out waiting 30000ms for send operation to complete", "Application timeout caused pair closure"):
        assert "no answer from another rank for 30 s" in str(lost_peer(RuntimeError(said), cluster))
    assert "closed its connection" in str(lost_peer(RuntimeError("Connection closed by peer [10.0.0.1]:1"), cluster))
    assert lost_peer(RuntimeError("something else"), cluster) is None
