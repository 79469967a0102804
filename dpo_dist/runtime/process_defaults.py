"""Defaults of every process of a run, where a person has set none: how memory is allocated, and CPU threads."""
from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from packaging.version import Version

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")         # since torch 2.9, and before
EXPANDABLE = "expandable_segments:True"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8          # mallopt(3)
NEVER, LARGEST_KEPT = 2**31 - 1, 32 * 2**20                           # bytes; glibc's own limit to the latter


def set_defaults() -> None:
    """Called before the first tensor is put on a GPU, when torch reads its allocator's settings."""
    if not any(name in os.environ for name in ALLOCATOR):
        # packs differ in length: otherwise memory allocated for one length cannot serve another
        os.environ[ALLOCATOR[Version(torch.__version__) < Version("2.9")]] = EXPANDABLE
    if threads_are_torchruns():
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
        os.environ["OMP_NUM_THREADS"] = str(threads)                 # for libraries that are loaded later
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Called where a CPU computes, before any thread starts: the memory of freed tensors stays for the next ones.

    glibc would give it back to the kernel, and the next ones get pages that must be zeroed first: under ZeRO-3, which
    gathers and frees all weights at every step, most of the kernel's time. Tensors above 32 MiB still come and go: kept
    as well, they leave holes that an equal one does not fit into, and the process grows. One arena, as one thread's
    freed memory would serve no other (backward and gloo have threads of their own). A person who set anything of
    glibc's malloc has chosen; another C library has no mallopt.
    """
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if chosen or mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    mallopt(M_ARENA_MAX, 1)


def threads_are_torchruns() -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's: it sets it where nobody has, so its own environment lacks it."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False                                                 # torchrun is gone, or is another user's
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment.split(b"\0"))
