"""The watchdog for hung collectives: where a rank stands, written to its log before the job ends for it.

A rank without a sign of life for most of cluster.timeout_seconds writes its stacks: one that waits in a collective, one
that hangs elsewhere, and one that was stopped, once it goes on. Signs are collectives that begin or end, and packs.
Nothing is ended here, as long work is no fault: that is for the timeout of the collective in which another rank waits.
"""
from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

SHARE = 0.9                  # of the timeout: the stacks are written before the rank that waits longest fails
LONGEST_BETWEEN_LOOKS = 1.0  # seconds

_last_sign = 0.0


def sign() -> None:
    """This rank is alive and gets on. It costs 0.1 µs."""
    global _last_sign
    _last_sign = time.monotonic()


def watched(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with a sign before it and one after it."""
    @wraps(collective)
    def call(*args: Any, **options: Any) -> Any:
        sign()
        result = collective(*args, **options)
        sign()
        return result

    return call


@contextmanager
def watching(log: Path, timeout_seconds: float) -> Iterator[None]:
    """Inside, all threads' stacks go to `log` if signs fail to come; also where a fatal signal ends the process, as
    NCCL's own watchdog does it."""
    over = threading.Event()
    sign()
    with log.open("ab", buffering=0) as file:
        faulthandler.enable(file)
        watcher = threading.Thread(target=_watch, args=(file.fileno(), SHARE * timeout_seconds, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            faulthandler.cancel_dump_traceback_later()
            faulthandler.enable()                        # standard error again


def _watch(log: int, seconds: float, over: threading.Event) -> None:
    """Sets the timer anew after each sign. The timer's own thread needs no interpreter lock, which what hangs may
    hold."""
    seen = 0.0
    while not over.wait(min(LONGEST_BETWEEN_LOOKS, seconds / 20)):
        if _last_sign != seen:
            seen = _last_sign
            faulthandler.dump_traceback_later(max(0.001, seen + seconds - time.monotonic()), file=log)
