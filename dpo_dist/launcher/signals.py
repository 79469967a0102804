"""Signals are noted when they come, and acted on later, where nothing is lost."""
from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def receiving(*numbers: signal.Signals, for_good: bool = False) -> Iterator[list[int]]:
    """Collects these signals while the block runs, in order; one that is ignored (nohup) stays ignored. They are noted,
    not raised: an exception while a process is being started would lose that process. for_good: what comes later is
    ignored, as the process is about to end by itself."""
    received: list[int] = []
    former = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    note: Callable[..., None] = lambda number, frame: received.append(number)      # noqa: E731
    for number in former:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_IGN if for_good else handler)
