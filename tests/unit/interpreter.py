"""Triton's kernels without a GPU: programs that check them run in Triton's interpreter, on CPU tensors."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from conftest import REPO

BESIDE = Path(sys.prefix) / "triton"              # where `make` puts it; torch's CUDA builds bring their own
MISSING = importlib.util.find_spec("triton") is None and not (BESIDE / "triton").is_dir()


def check(program: str) -> None:
    """Runs tests/unit/<program>, which asserts what the kernels owe."""
    found = [str(REPO), str(REPO / "tests"), *([str(BESIDE)] if BESIDE.is_dir() else [])]
    done = subprocess.run([sys.executable, Path(__file__).parent / program], capture_output=True, text=True, cwd=REPO,
                          env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(found)})
    assert done.returncode == 0 and "the kernels agree" in done.stdout, done.stderr[-3000:]
