"""Whose disk is full, read-only or broken, and what a person is told of it."""
from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from dpo_dist.runtime.disk_faults import disk_fault

SAY = """
import errno, os, sys
from pathlib import Path
from dpo_dist.runtime.disk_faults import disk_fault
number, folders = getattr(errno, sys.argv[1]), {name: Path(name) for name in sys.argv[2:]}
print(disk_fault(OSError(number, os.strerror(number)), folders))
"""


def said_where(mounts: str, folder: Path, *words: str) -> str:
    """What is said in a folder with these mounts, of an error that names no file."""
    script = f'cd {folder} && mkdir small large && {mounts} && exec "$@"'
    done = subprocess.run(["unshare", "-m", "bash", "-c", script, "bash", sys.executable, "-c", SAY, *words], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(REPO)}, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize(("mounts", "fault", "told"), [
    ("mount -t tmpfs -o size=12k x small", "ENOSPC",
     "No space left on device: small=small (0.0117 MiB of 0.0117 MiB are left); make room there"),
    ("mount -t tmpfs -o size=9m,nr_inodes=2 x small && touch small/last", "ENOSPC",
     "No space left on device: small=small (no further file can be made there, whatever its size: the disk has no "
     "inodes left); make room there"),
    ("mount -t tmpfs -o ro x small", "EROFS", "Read-only file system: small=small; mend that"),
    ("true", "EIO", "Input/output error: large=large or small=small; mend that"),
])
def test_of_several_folders_the_one_with_the_fault_is_named(mounts: str, fault: str, told: str, tmp_path: Path):
    assert said_where(mounts, tmp_path, fault, "large", "small").startswith(told)


def test_a_file_that_the_error_names_is_told_with_the_room_of_its_own_disk(tmp_path: Path):
    told = disk_fault(OSError(errno.ENOSPC, "no room", str(tmp_path / "new" / "file")), {"run.dir": Path("/proc")})
    assert told is not None and told.startswith(f"No space left on device: {tmp_path}/new/file (")
    assert "(0 " not in told, "/proc has no room"


def test_the_systems_words_in_a_librarys_error_are_heard_and_other_errors_are_none(tmp_path: Path):
    told = disk_fault(RuntimeError("I/O error: No space left on device (os error 28)"), {"run.dir": tmp_path})
    assert told is not None and f"run.dir={tmp_path} (" in told
    too_many = disk_fault(OSError(errno.EMFILE, "too many"), {"run.dir": tmp_path})
    assert too_many is not None and "ulimit -n" in too_many
    assert disk_fault(RuntimeError("out of range"), {"run.dir": tmp_path}) is None
    assert disk_fault(FileNotFoundError(errno.ENOENT, "none", "a"), {"run.dir": tmp_path}) is None
