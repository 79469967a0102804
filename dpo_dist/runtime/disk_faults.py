"""A disk that is full, read-only or broken is no fault of ours: a person is told which, and how much room there is. So
is a limit on open files."""
from __future__ import annotations

import errno
import os
import resource
from collections.abc import Mapping
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
TOO_MANY = (errno.EMFILE, errno.ENFILE)
FAULTS = (*FULL, *TOO_MANY, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ESTALE)
# whose words nothing else would say
IN_WORDS = (*FULL, *TOO_MANY, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
MIB, GIB = 2**20, 2**30


def disk_fault(error: BaseException, folders: Mapping[str, Path]) -> str | None:
    """What a person is told, where a disk's fault caused this error; None for any other error. folders: {name: folder}
    of what may have been written, where the error does not name a file."""
    number = _number(error)
    if number is None:
        return None
    if number in TOO_MANY:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (f"{os.strerror(number)}: a process may have {most:,} (ulimit -n); raise that, and the same command "
                "goes on from the last checkpoint")
    file = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename else None
    where = {str(file): file} if file else _of_faulty_disks(number, folders)
    what = f"{os.strerror(number)}: {' or '.join(where)}"
    if number not in FULL:
        return f"{what}; mend that, and the same command goes on from the last checkpoint"
    return f"{what}{_room(*where.values())}; make room there, and the same command goes on from the last checkpoint"


def _of_faulty_disks(number: int, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Those of the folders that lie on a disk with this fault, by their names; all where none is known to."""
    disks = {f"{name}={folder}": (folder, disk) for name, folder in folders.items() if (disk := _disk(folder))}
    if number in FULL and disks:
        fullest = min(disks, key=lambda name: 0 if _has_no_files_left(disks[name][1]) else _free(disks[name][1]))
        return {fullest: disks[fullest][0]}
    read_only = {name: folder for name, (folder, disk) in disks.items() if disk.f_flag & os.ST_RDONLY}
    return (read_only if number == errno.EROFS else {}) or {f"{name}={path}": path for name, path in folders.items()}


def _room(path: Path) -> str:
    """How much room is left where this path is, in brackets; nothing where that cannot be known."""
    disk = _disk(path)
    if disk is None:
        return ""
    if _has_no_files_left(disk):
        return " (no further file can be made there, whatever its size: the disk has no inodes left)"
    return f" ({_size(_free(disk))} of {_size(disk.f_blocks * disk.f_frsize)} are left)"


def _size(n: int) -> str:
    return f"{n / GIB:.3g} GiB" if n >= GIB else f"{n / MIB:.3g} MiB"


def _disk(path: Path) -> os.statvfs_result | None:
    """The file system of a path, whose last parts need not be there."""
    for there in (path.absolute(), *path.absolute().parents):
        try:
            return os.statvfs(there)
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def _free(disk: os.statvfs_result) -> int:
    return disk.f_bavail * disk.f_frsize


def _has_no_files_left(disk: os.statvfs_result) -> bool:
    return disk.f_files > 0 and disk.f_favail == 0       # some file systems make inodes as they need them, and say 0


def _number(error: BaseException) -> int | None:
    """Libraries hide the system's error in one of their own, whose text still has the system's words."""
    if isinstance(error, OSError) and error.errno in FAULTS:
        return error.errno
    words = str(error)
    return next((number for number in IN_WORDS if os.strerror(number) in words), None)
