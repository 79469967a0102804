"""Ending early without loss: a signal is noted, and all ranks act on it together.

USR1 (a scheduler, ahead of its time limit), TERM (a preemption; Slurm sends it twice) and Ctrl-C are heard. Where
something is to be kept, the ranks agree by the largest of their `received()`, in a collective, keep it, and raise
`Stopped` (World.heed_signals). Where nothing is, as while a model is read, each rank ends at once (`end_at_once`).
"""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

End = Callable[[signal.Signals], None]

_received = 0
_end: End | None = None                                  # what a signal does at once
_only_noted = True
_lock = threading.RLock()                                # of the two above


class Stopped(Exception):
    """The work ended where it was asked to; the same command goes on from there. `number`: of the signal agreed on."""

    def __init__(self, number: float, kept: str):
        self.signal, self.kept = signal.Signals(int(number)), kept
        super().__init__(f"stopped by {self.signal.name}: {kept}; the same command goes on from there")

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, str]]:
        return Stopped, (int(self.signal), self.kept)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as in any program; else 0, since torchrun and srun take anything else for a failure."""
        return 130 if self.signal == signal.SIGINT else 0


def listen(end: End | None = None) -> None:
    """From here on these signals are heard instead of ending the process; a second Ctrl-C ends it at once. With `end`,
    as after `end_at_once`."""
    global _end
    for heard in HEARD:
        signal.signal(heard, _hear)
    if end is not None:
        _end = end
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)     # each signal's number, whatever the process is at
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=_wait_for_signals, args=(reading,), daemon=True).start()
        end_at_once()


def end_at_once() -> None:
    """From here on a signal calls the `end` that `listen` was given, and that does not return: nothing is under way
    that would be lost. A thread calls it, also where the main one is in a library's call for minutes."""
    _set_only_noted(False)
    _act()


def only_note() -> None:
    """From here on signals are only noted: there is something to keep."""
    _set_only_noted(True)


@contextmanager
def noted() -> Iterator[None]:
    """Inside, signals are only noted: the work inside looks for them itself, and keeps what is done."""
    before = _only_noted
    only_note()
    try:
        yield
    finally:
        _set_only_noted(before)
    _act()


def receive(number: signal.Signals) -> None:
    """Notes the signal, as if this rank had been sent it."""
    global _received
    _received = max(_received, number)


def received() -> float:
    """The number of the signal that this rank was sent, or 0. Ranks take the largest, so a scheduler's beats Ctrl-C."""
    return float(_received)


def heed(kept: str) -> None:
    """Raises Stopped where this rank was sent a signal: inside World.on_main or World.together, which tell the
    others."""
    if _received:
        raise Stopped(_received, kept)


def _hear(number: int, frame: FrameType | None) -> None:
    receive(signal.Signals(number))
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_for_signals(pipe: int) -> None:
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if number in HEARD:
                receive(signal.Signals(number))
        _act()


def _act() -> None:
    with _lock:
        if _end is not None and _received and not _only_noted:
            _end(signal.Signals(_received))


def _set_only_noted(value: bool) -> None:
    global _only_noted
    with _lock:                                          # which `end` holds until the process is gone
        _only_noted = value


def _forget() -> None:
    """In a forked child, which tells its parent nothing when it is told to end."""
    global _end
    _end = None
    signal.set_wakeup_fd(-1)
