"""train.save_every_minutes: when it is time for a checkpoint, by one clock for all ranks."""
from __future__ import annotations

import time
from collections.abc import Callable


class SaveTimer:
    """Says when so many minutes have passed since the last save, or since the start; never, where they are None."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self._seconds = float("inf") if minutes is None else 60 * minutes
        self._clock, self._since = clock, clock()

    def asks(self) -> float:
        """0.5 where it is time, else 0. Less than a signal's number, so one collective can carry both."""
        return 0.5 if self._clock() - self._since >= self._seconds else 0.0

    def restart(self) -> None:
        self._since = self._clock()
