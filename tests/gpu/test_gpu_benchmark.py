"""benchmarks/gpu.py run for real, small: every way to compute a step or its attention works on this device, and they agree."""
from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_every_case_of_the_benchmark_runs_and_all_attentions_agree(tmp_path: Path):
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, REPO / "benchmarks" / "gpu.py", "--models", "0.5B", "--lengths", "512", "--minutes", "8",
                           "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 9 and all("seconds" in row for row in rows.values()), rows
    for name in ("dpo", "dpo sdpa", "dpo flex", "dpo compiled", "naive"):
        assert rows[name]["first_loss"] == pytest.approx(math.log(2), abs=0.05), name
    for name in ("attention sdpa", "attention flex"):
        assert rows[name]["differs_by"] < 0.05, name
    assert 0 < rows["dpo"]["share_of_product"] < 1
