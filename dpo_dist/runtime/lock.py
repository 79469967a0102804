"""A folder's lock, held while its work is alive. The system releases it however that work ends."""
from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO

from dpo_dist.config.errors import UserError

LOCK = ".lock"
SECONDS_FOR_A_LOOK = 1.0               # `is_held` takes a lock for a moment; wait longer than that


def hold_lock(folder: Path) -> TextIO:
    """An open file that holds the folder's lock until it is closed. UserError where another process holds it."""
    file = (folder / LOCK).open("w")
    deadline = time.monotonic() + SECONDS_FOR_A_LOOK
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                file.close()
                raise UserError("another process is at work there now") from error
            time.sleep(0.05)


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock, on this machine or on another that shares the file system's locks."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
