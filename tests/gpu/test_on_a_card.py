"""What only a GPU can show: its kernels compute what the CPU's operations compute. The benchmark's own probes, held
against bounds."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

pytestmark = [
    pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_golden_gradients_attention_head_and_kernels_are_right_on_this_card(tmp_path: Path):
    done = subprocess.run(["bash", "benchmarks/gpu.sh", "probes", "--only", "golden|attention|head|elementwise",
                           "--out", tmp_path], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = [row for file in tmp_path.glob("gpu-*-probes.json") for row in json.loads(file.read_text())["rows"]]
    by_part = {
        part: [row for row in rows if row["part"] == part] for part in ("golden", "attention", "head", "elementwise")}
    exact = next(row for row in by_part["golden"] if row["case"] == "float32")
    assert exact["worst_loss"] < 2e-5 and exact["worst_grad_norm"] < 1e-4
    for row in by_part["attention"]:
        assert "FlashAttention" in row["kernel"]
        assert max(row.get(f"error_{tensor}", 0) for tensor in ("o", "dq", "dk", "dv")) < 0.02, row
    for row in by_part["head"]:
        assert row["kernels"] == "Triton's" and row["worst_nats"] < 0.05 and row["error_hidden_gradient"] < 0.02, row
    assert by_part["elementwise"] and all(row["largest_difference"] < 0.05 for row in by_part["elementwise"])
