"""A bound on the time that somebody else's template may take."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dpo_dist.config.errors import UserError


@contextmanager
def in_time(seconds: float, what: str) -> Iterator[None]:
    """Raises UserError where the block takes longer; in a thread that is not the main one, where no signal comes, it
    takes as long as it takes."""
    def late(number: int, frame: FrameType | None) -> None:
        raise UserError(f"{what} was not done after {seconds:g} s with one conversation; mend it")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
