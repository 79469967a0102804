"""Under ZeRO-3, whose weights are gone when backward computes layers again, gradients stay what they are."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, write_tiny_qwen2

pytestmark = pytest.mark.distributed


def test_recomputing_is_exact_where_weights_are_released_after_every_use(tmp_path: Path):
    """With the model's own code, adapters, and fused functions. Qwen2: DeepSpeed adds its biases in place, to products
    that are kept."""
    model = write_tiny_qwen2(tmp_path / "qwen2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                "localhost:0"]
    done = subprocess.run([*torchrun, "--nproc-per-node", "2", "tests/distributed/recomputing_side_by_side.py",
                           str(model)], cwd=REPO, env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests' / 'unit'}"},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 3 * 4
    for row in rows:
        assert row["error"] < 2e-6, row
