"""Progress: how far the work has come, as a bar on a terminal or as lines elsewhere."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 5.0             # where the output is a file or a pipe
SECONDS_BETWEEN_REDRAWS = 0.25          # of the bar, on a terminal


class Progress:
    """How far the work has come. This class shows nothing, as every process but the main one does."""

    def __init__(self, total: int, done: int, description: str):
        self.total, self._first, self._description = total, done, description
        self._started = time.monotonic()

    def update(self, step: int, loss: float | None = None, accuracy: float | None = None,
               pairs_per_second: float | None = None) -> None:
        """Tells that `step` of `total` steps are done; the other values are shown beside them."""
        done, left = step - self._first, self.total - step
        parts = [
            f"loss {loss:.4f}" if loss is not None else "",
            f"accuracy {accuracy:.3f}" if accuracy is not None else "",
            f"{pairs_per_second:.1f} pairs/s" if pairs_per_second is not None else "",
            f"{timedelta(seconds=round((time.monotonic() - self._started) / done * left))} left" if done > 0
            and left > 0 else "",
        ]
        self._show(step, "  ".join(part for part in parts if part))

    def _show(self, step: int, measures: str) -> None:
        """Shows the step, with the other values and the time that is left as text."""


class Lines(Progress):
    """For a file or a pipe: a line now and then."""

    def __init__(self, total: int, done: int, description: str, say: Callable[[str], None]):
        super().__init__(total, done, description)
        self._say, self._next_line_at, self._held_back = say, 0.0, ""

    def _show(self, step: int, measures: str) -> None:
        self._held_back = "  ".join(part for part in (self._description, f"{step}/{self.total}", measures) if part)
        if time.monotonic() >= self._next_line_at or step >= self.total:
            self.last()

    def last(self) -> None:
        """Writes the newest line, unless it stands there already."""
        if self._held_back:
            self._say(self._held_back)
            self._held_back, self._next_line_at = "", time.monotonic() + SECONDS_BETWEEN_LINES


class _Bar(Progress):
    def __init__(self, total: int, done: int, description: str, rich: RichProgress):
        super().__init__(total, done, description)
        self._rich, self._redraw_at = rich, 0.0
        self.task: TaskID = rich.add_task(description, total=total, completed=done, measures="")

    def _show(self, step: int, measures: str) -> None:
        self._rich.update(self.task, completed=step, measures=measures)
        if time.monotonic() >= self._redraw_at or step >= self.total:
            self._rich.refresh()
            self._redraw_at = time.monotonic() + SECONDS_BETWEEN_REDRAWS


class Bars:
    """The bars on the terminal, one below the other: an evaluation's bar may come and go below the training's."""

    def __init__(self, console: Console):
        self._console = console
        self._rich: RichProgress | None = None         # while there are bars

    @contextmanager
    def bar(self, total: int, done: int, description: str) -> Iterator[Progress]:
        if self._rich is None:
            # No thread redraws: the bar moves only when a step is done. Nor does rich take over sys.stdout and stderr.
            self._rich = RichProgress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[measures]}", markup=False), console=self._console, auto_refresh=False,
                redirect_stdout=False, redirect_stderr=False)
            self._rich.start()
        bar = _Bar(total, done, description, self._rich)
        self._rich.refresh()
        try:
            yield bar
        finally:
            if len(self._rich.tasks) > 1:
                self._rich.remove_task(bar.task)
            else:                                      # the last one stays on the screen
                self._rich.stop()
                self._rich = None
