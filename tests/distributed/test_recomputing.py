"""Under ZeRO-3, whose weights are gone when backward computes layers again, gradients stay what they are."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import forked_ranks, write_tiny_qwen2

pytestmark = pytest.mark.distributed


def test_recomputing_is_exact_where_weights_are_released_after_every_use(tmp_path: Path):
    """With the model's own code, adapters, and fused functions. Qwen2: DeepSpeed adds its biases in place, to products
    that are kept."""
    model = write_tiny_qwen2(tmp_path / "qwen2")
    shown = forked_ranks(2, Path(__file__).with_name("recomputing_side_by_side.py"), model)
    rows = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert len(rows) == 3 * 4
    for row in rows:
        assert row["error"] < 2e-6, row
