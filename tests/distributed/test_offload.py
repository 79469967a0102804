"""A reference larger than the memory of its process is scored all the same, from its files."""
from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, write_tiny_llama

pytestmark = pytest.mark.distributed

SCORES = """
import os, sys
from pathlib import Path
import numpy, torch
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.reference.hf import HfReference

folder, offload, into, group = sys.argv[1:]
if group:
    Path(group, "cgroup.procs").write_text(str(os.getpid()))       # what was allocated so far is charged elsewhere
engine = HfReference(ModelFolder(Path(folder)), torch.float32, "branch", torch.device("cpu"), offload)
pack = pack_sequences([Sequences(tuple(range(3, 40)), (tuple(range(3, 30)), tuple(range(30, 60))))] * 2)
numpy.save(into, torch.cat([engine.token_logps(pack) for _ in range(2)]).numpy())
"""


@pytest.fixture
def half_its_size(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(a model's folder, a memory cgroup that may hold half of the model's weights)."""
    model = write_tiny_llama(tmp_path / "m", dtype="bfloat16", vocab_size=2048, hidden_size=1024,
                             intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8, initializer_range=0.02)
    fp32_bytes = 2 * (model / "model.safetensors").stat().st_size
    top = Path("/sys/fs/cgroup")
    second = (top / "cgroup.controllers").exists()
    group = (top if second else top / "memory") / f"dpo-dist-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(fp32_bytes // 2))
        # the first's counts memory and swap together
        swap = group / ("memory.swap.max" if second else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if second else str(fp32_bytes // 2))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield model, str(group)
    group.rmdir()


def score(model: Path, offload: str, into: Path, group: str = "") -> int:
    return subprocess.run([sys.executable, "-c", SCORES, str(model), offload, str(into), group], cwd=REPO,
                          env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}, timeout=120,
                          capture_output=True).returncode


def test_a_reference_of_twice_the_size_that_a_process_may_hold_is_scored_from_disk(
        half_its_size: tuple[Path, str], tmp_path: Path):
    import numpy as np

    model, group = half_its_size
    assert score(model, "none", tmp_path / "capped.npy", group) == -9, "held whole, it is killed for its memory"
    assert score(model, "disk", tmp_path / "disk.npy", group) == 0
    assert score(model, "none", tmp_path / "whole.npy") == 0
    assert np.array_equal(np.load(tmp_path / "disk.npy"), np.load(tmp_path / "whole.npy"))
