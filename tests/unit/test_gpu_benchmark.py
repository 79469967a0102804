"""benchmarks/gpu.sh works before there is a card to run it on: everything in it, small, on the CPU, with figures that
mean something there."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def smoke(out: Path, call: str) -> dict[str, dict[str, Any]]:
    """{"part/case": row} of a call."""
    done = subprocess.run(["bash", "benchmarks/gpu.sh", call, "--cpu-smoke", "--out", out], cwd=REPO,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TMPDIR": str(out),
                               "WHEELS": "none"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = json.loads((out / f"gpu-CPU-{call}.json").read_text())["rows"]
    return {f"{row['part']}/{row['case']}": row for row in rows}


def test_every_probe_gives_its_rows_and_they_are_right(tmp_path: Path):
    rows = smoke(tmp_path, "probes")
    parts = {name.split("/")[0] for name in rows}
    assert parts == {"machine", "rates", "golden", "attention", "head", "elementwise", "profile"}
    assert rows["golden/float32"]["cases"] == 58
    assert rows["golden/float32"]["worst_loss"] < 2e-5 and rows["golden/float32"]["worst_grad_norm"] < 1e-4
    assert 1e-3 < rows["golden/bfloat16"]["worst_grad_norm"] < 0.3, "bf16 rounds, and no more than that"
    for name, row in rows.items():
        if name.startswith("attention/"):
            assert max(row[f"error_{tensor}"] for tensor in ("o", "dq", "dk", "dv")) < 0.02, name
        if name.startswith("head/"):
            assert row["worst_nats"] < 0.05 and row["error_hidden_gradient"] < 0.02, name
        if name.startswith("elementwise/"):
            assert row["largest_difference"] < 0.05, name
    assert rows["profile/tiny zero.stage=2"]["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows["profile/tiny zero.stage=2"]["scoring_over_training"] > 0


def test_the_product_runs_are_those_of_the_real_command_and_a_second_call_measures_nothing_again(tmp_path: Path):
    rows = smoke(tmp_path, "runs")
    assert set(rows) == {"3B-zero2/ours", "0.5B-none/ours", "8B-lora/ours", "3B-recompute/ours"}
    for name, row in rows.items():
        assert row["first_loss"] == pytest.approx(math.log(2), abs=1e-6), name
        assert row["step_seconds"] > 0 and row["predicted_gib"] is not None
    before = (tmp_path / "gpu-CPU-runs.json").stat().st_mtime_ns
    assert smoke(tmp_path, "runs") == rows and (tmp_path / "gpu-CPU-runs.json").stat().st_mtime_ns == before
