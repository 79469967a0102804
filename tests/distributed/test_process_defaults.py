"""Threads and allocator of a process of a run, under real torchrun: sensible where nobody has said, and as a person
says otherwise."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

pytestmark = pytest.mark.distributed

PROGRAM = """
import os, torch
from dpo_dist.runtime.process_defaults import set_defaults
os.sched_getaffinity = lambda process: set(range(8))           # as on a machine of eight cores
set_defaults()
allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
print(f"told: {os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()} {allocator}", flush=True)
"""


def shown(folder: Path, **environment: str) -> set[str]:
    """What two processes of torchrun have: OMP_NUM_THREADS, torch's threads, the allocator's settings."""
    (folder / "program.py").write_text(PROGRAM)
    ours = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           folder / "program.py"], capture_output=True, text=True,
                          env={**clean, "PYTHONPATH": str(REPO), **environment})
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("told: ") for line in done.stdout.splitlines() if line.startswith("told: ")]
    assert len(lines) == 2
    return set(lines)


def test_bare_torchrun_shares_the_cores_among_its_processes(tmp_path: Path):
    assert shown(tmp_path) == {"4 4 expandable_segments:True"}


def test_what_a_person_sets_stays(tmp_path: Path):
    assert shown(tmp_path, OMP_NUM_THREADS="1", PYTORCH_CUDA_ALLOC_CONF="backend:native") == {"1 1 backend:native"}
    assert shown(tmp_path, OMP_NUM_THREADS="2", PYTORCH_ALLOC_CONF="backend:native") == {"2 2 backend:native"}
