"""Standard input, output and error of a process that was started without some of them, as by `command >&-`."""
from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Opens what is closed on /dev/null: else the next file that is opened would silently take its place, and get what
    is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)               # takes the lowest free number, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", errors="backslashreplace", closefd=False))
