"""A disk that is full, read-only or broken is no fault of ours: a person is told which, and how much room there is."""
from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
FAULTS = (*FULL, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
# whose words nothing else would say
IN_WORDS = (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)
GIB = 2**30


def disk_fault(error: BaseException, folder: Path) -> str | None:
    """What a person is told, where a disk's fault caused this error; None for any other error. folder: what was being
    written below, where the error does not name a file."""
    number = _number(error)
    if number is None:
        return None
    file = error.filename if isinstance(error, OSError) and error.filename else folder
    what = f"{os.strerror(number)}: {file}"
    if number not in FULL:
        return f"{what}; mend that, and the same command goes on from the last checkpoint"
    try:
        usage = shutil.disk_usage(folder)
        room = f" ({usage.free / GIB:.3g} GiB of {usage.total / GIB:.3g} are left)"
    except OSError:
        room = ""
    return f"{what}{room}; make room there, and the same command goes on from the last checkpoint"


def _number(error: BaseException) -> int | None:
    """Libraries hide the system's error in one of their own, whose text still has the system's words."""
    if isinstance(error, OSError) and error.errno in FAULTS:
        return error.errno
    words = str(error)
    return next((number for number in IN_WORDS if os.strerror(number) in words), None)
