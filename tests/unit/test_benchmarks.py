"""What the documents say of the benchmarks is what the committed results say."""
from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REPO


def test_the_readmes_tables_are_those_of_the_committed_results():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=REPO)
    assert done.returncode == 0, "run benchmarks/tables.py"


def test_every_difference_to_trls_tokens_is_judged():
    assert "completions as generated" in (text := (REPO / "README.md").read_text()) and "not judged" not in text


def test_whole_runs_are_compared_within_a_round_and_only_where_both_were_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    from real_model import summary

    def run(seconds: float, loss: float) -> dict:
        return {"seconds": seconds, "processor_seconds": 2 * seconds, "peak_gib": 1.0, "losses": [0.7, loss]}

    rounds = {"0": {"TRL live": run(50, 0.6), "ours": run(10, 0.5)},
              "1": {"TRL live": run(90, 0.6), "ours": run(30, 0.6)}, "2": {"ours": run(1, 0.6)}}
    assert summary(rounds) == {"TRL, live reference / ours": {
        "seconds": 4.0, "processor_seconds": 4.0, "peak_gib": 1.0, "losses apart": pytest.approx(0.1)}}
