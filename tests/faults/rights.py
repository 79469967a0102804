"""What some faults need of the machine: mounts of their own, a C compiler, network namespaces."""
from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

CLONE_NEWNS = 0x20000
MOUNTS, PRELOAD, NETWORK = "mounts", "preload", "network"
PRELOADED = "DPO_FAULTS_PRELOADED"       # set once the processes of the campaign have it


def missing(need: str) -> str:
    """Why there is none; empty where there is."""
    return {MOUNTS: _no_mounts, PRELOAD: _no_preload, NETWORK: _no_network}[need]()


@cache
def _no_mounts() -> str:
    """This process leaves the machine's mounts for its own, which end with it."""
    if os.geteuid() != 0:
        return "mounts need root"
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return f"no mounts of its own: {os.strerror(ctypes.get_errno())}"
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return done.stderr.strip()


@cache
def _no_preload() -> str:
    return "" if os.environ.get(PRELOADED) else "no C compiler (gcc or cc)" if not _compiler() else "not preloaded"


@cache
def _no_network() -> str:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    return ""


def preload(folder: Path) -> None:
    """Has the processes that are started from now on, the template first, load preload.c. Nothing without a
    compiler."""
    if compiler := _compiler():
        library = folder / "preload.so"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("preload.c"),
                        "-ldl"], check=True)
        os.environ.update({"LD_PRELOAD": str(library), PRELOADED: "1"})


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def unmount(folder: Path) -> None:
    """At once for everybody; what still has a file open keeps it."""
    subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)
