"""A run leaves its report, and one that cannot be written costs the run nothing."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed


def test_a_run_leaves_its_report_with_the_command_and_loses_nothing_where_it_cannot_be_written(
        tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 24)
    write_rows(tmp_path / "eval.jsonl", 8, seed=5)
    run = tmp_path / "run"
    words = [*base, f"model.path={tmp_path / 'm'}", train_on(tmp_path / "rows.jsonl"), eval_on(tmp_path / "eval.jsonl"),
             "zero=zero2", "train.pairs_per_step=8", "cluster.procs_per_node=2", f"run.dir={run}"]
    done = dpo_dist("run", *words)
    assert f"report: {run / 'report.html'}" in done.stdout
    page, numbers = (run / "report.html").read_text(), json.loads((run / "report.json").read_text())
    assert numbers["runs"][0]["state"] == f"done; the model is in {run / 'model'}"
    assert set(numbers["plots"]) >= {"loss", "margin", "kl", "speed", "frontier"}
    assert f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, format: token_ids}}]" in page
    assert (run / "command.txt").read_text().startswith("dpo-dist run ") and "run.dir" not in page.split("typed in")[0]

    (run / "report.html").unlink()
    (run / "report.html").mkdir()                        # nothing can be written under its name
    again = dpo_dist("train", *words)
    assert "nothing to do" in again.stdout and "report: not written (IsADirectoryError" in again.stdout
    assert (run / "DONE").exists()
