"""Ending early without loss: a signal is noted, and all ranks act on it together at the end of a step.

USR1 (a scheduler, ahead of its time limit), TERM (a preemption; Slurm sends it twice) and Ctrl-C are heard. The ranks
agree by the largest of their `received()`, in a collective that runs anyway, save, and raise `Stopped`.
"""
from __future__ import annotations

import signal
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

_received = 0


class Stopped(Exception):
    """The work ended where it was asked to; the same command goes on from there. `number`: of the signal agreed on."""

    def __init__(self, number: float, kept: str):
        self.signal = signal.Signals(int(number))
        super().__init__(f"stopped by {self.signal.name}: {kept}; the same command goes on from there")

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as in any program; else 0, since torchrun and srun take anything else for a failure."""
        return 130 if self.signal == signal.SIGINT else 0


def listen() -> None:
    """From here on these signals are heard instead of ending the process; a second Ctrl-C ends it at once."""
    for heard in HEARD:
        signal.signal(heard, _hear)


def receive(number: signal.Signals) -> None:
    """Notes the signal, as if this rank had been sent it."""
    global _received
    _received = max(_received, number)


def received() -> float:
    """The number of the signal that this rank was sent, or 0. Ranks take the largest, so a scheduler's beats Ctrl-C."""
    return float(_received)


def _hear(number: int, frame: FrameType | None) -> None:
    receive(signal.Signals(number))
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
