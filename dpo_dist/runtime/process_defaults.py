"""Defaults of every process of a run, where a person has set none: how GPU memory is allocated, and CPU threads."""
from __future__ import annotations

import os
from pathlib import Path

import torch
from packaging.version import Version

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")         # since torch 2.9, and before
EXPANDABLE = "expandable_segments:True"


def set_defaults() -> None:
    """Called before the first tensor is put on a GPU, when torch reads its allocator's settings."""
    if not any(name in os.environ for name in ALLOCATOR):
        # packs differ in length: otherwise memory allocated for one length cannot serve another
        os.environ[ALLOCATOR[Version(torch.__version__) < Version("2.9")]] = EXPANDABLE
    if threads_are_torchruns():
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
        os.environ["OMP_NUM_THREADS"] = str(threads)                 # for libraries that are loaded later
        torch.set_num_threads(threads)


def threads_are_torchruns() -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's: it sets it where nobody has, so its own environment lacks it."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False                                                 # torchrun is gone, or is another user's
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment.split(b"\0"))
