"""What disks, networks and cut-off writes do to a file."""
from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path


def flip(file: Path, at: int | None = None, bit: int = 4) -> None:
    """Flips one bit, as a disk or a cable does: of byte `at`, by default the middle one."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= bit
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def garbage(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


WAYS: tuple[Callable[[Path], None], ...] = (flip, cut, garbage, Path.unlink)
