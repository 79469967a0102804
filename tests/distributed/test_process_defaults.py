"""Threads and allocators of a process of a run, threads under real torchrun: sensible where nobody has said, and as a
person says otherwise."""
from __future__ import annotations

import os
import platform
import resource
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


FREED = """
import resource, torch
from dpo_dist.config.compose import compose
from dpo_dist.runtime.world import World
World.start(compose(["model.path=none", "cluster.device=cpu"]).cluster)
def faults(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib * 2**18) for _ in range(8)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(16)                                                     # 128 MiB: more than glibc keeps by itself
print(f"told: {faults(15)}", flush=True)
import os; os._exit(0)
"""


def new_pages(**environment: str) -> int:
    """Pages that tensors of 120 MiB take from the kernel after some of 128 MiB were freed."""
    clean = {name: value for name, value in os.environ.items()
             if name != "GLIBC_TUNABLES" and not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True,
                          env={**clean, "PYTHONPATH": str(REPO), **environment})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("told: ")[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_on_a_cpu_freed_memory_serves_the_next_tensors_unless_a_person_chose_otherwise():
    pages = 120 * 2**20 // resource.getpagesize()
    assert new_pages() < pages / 20
    assert new_pages(MALLOC_ARENA_MAX="4") > pages / 2
