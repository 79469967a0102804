"""Terminal: what a person sees of a run. The libraries' own output goes to a log file, one a rank."""
from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text

from dpo_dist.runtime.progress import Bars, Lines, Progress
from dpo_dist.runtime.standard_streams import open_standard_streams

log = logging.getLogger("dpo_dist")
PLAIN_WIDTH = 132                       # characters, where the output is a file or a pipe


class Terminal:
    """One a process, made by `Terminal.start`. Only the main process speaks; every process may report an error."""

    _active: Terminal | None = None

    def __init__(self, log_path: str, is_main: bool, capture: bool):
        self.log_path, self.is_main = log_path, is_main
        self._stdout, self._stderr = _Output(1), _Output(2)
        self._out, self._err = _console(self._stdout), _console(self._stderr)
        self._capture, self._bars = capture, Bars(self._out)
        logging.raiseExceptions = False                  # a full disk must not cost the run because of its log
        self._log_handler = logging.FileHandler(log_path, encoding="utf-8")
        self._log_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._former_handlers, self._former_level = logging.root.handlers[:], logging.root.level
        self._former_hook: Callable[..., object] = sys.excepthook

    @classmethod
    def start(cls, log_path: str, is_main: bool, capture: bool = True) -> Terminal:
        """The process's terminal. From here on, all output to fds 1 and 2, from Python or C, is appended to `log_path`.

        With capture=False the two stay as they are, and only Python's logging and warnings go to the file.
        """
        if cls._active is not None:
            cls._active.stop()
        os.makedirs(os.path.dirname(os.path.abspath(log_path)), exist_ok=True)
        open_standard_streams()
        _flush()
        terminal = cls(log_path, is_main, capture)
        if capture:
            log_fd = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(log_fd, 1)
            os.dup2(log_fd, 2)
            os.close(log_fd)
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(line_buffering=True)             # so that the log keeps the order of events
            sys.excepthook = terminal._uncaught
        logging.root.handlers[:] = [terminal._log_handler]
        logging.root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        cls._active = terminal
        return terminal

    def stop(self) -> None:
        """Gives the process its stdout and stderr back. A second call does nothing."""
        if Terminal._active is not self:
            return
        Terminal._active = None
        _flush()
        if self._capture:
            os.dup2(self._stdout.fileno(), 1)
            os.dup2(self._stderr.fileno(), 2)
            sys.excepthook = self._former_hook
        logging.captureWarnings(False)
        logging.root.handlers[:] = self._former_handlers
        logging.root.setLevel(self._former_level)
        self._log_handler.close()

    def say(self, text: str) -> None:
        """Shows a line to the person and keeps it in the log. The text is shown as it is: no markup."""
        if self.is_main:
            log.info("%s", text)
            _print(self._out, Text(text))

    def error(self, text: str) -> None:
        """Shows what went wrong on the person's stderr, from whichever rank calls it, and keeps it in the log."""
        log.error("%s", text)
        _print(self._err, Text(text, style="bold red"))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Shows a table; numbers stand to the right, and nothing is cut off."""
        if not self.is_main:
            return
        body = [list(row) for row in rows]
        table = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=SIMPLE_HEAD)
        for i, name in enumerate(columns):
            is_number = all(isinstance(row[i], int | float) for row in body)
            table.add_column(Text(name), justify="right" if body and is_number else "left", overflow="fold")
        for row in body:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._out.print(table)

    @contextmanager
    def progress(self, total: int, done: int = 0, description: str = "") -> Iterator[Progress]:
        """A Progress whose `update(step, ...)` moves a bar on a terminal and writes lines, now and then, elsewhere."""
        if not self.is_main:
            yield Progress(total, done, description)
        elif self._out.is_terminal:
            with self._bars.bar(total, done, description) as bar:
                yield bar
        else:
            lines = Lines(total, done, description, lambda line: _print(self._out, Text(line)))
            try:
                yield lines
            finally:
                lines.last()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Writes an exception that nobody caught to the log, and tells the person where that is."""
        self._former_hook(kind, error, trace)
        if issubclass(kind, Exception):
            self.error(f"{kind.__name__}: {error}\nThe traceback is in {self.log_path}")


# --------------------------------------------------------------------------------------------------------------- output


class _Output(io.TextIOBase):
    """A file descriptor of the process's start, kept under another number. Losing its reader never fails a run."""

    encoding = "utf-8"

    def __init__(self, fd: int):
        self._fd, self._lost = os.dup(fd), False

    def write(self, text: str) -> int:
        rest = text.encode("utf-8", errors="replace")
        try:
            while rest and not self._lost:
                rest = rest[os.write(self._fd, rest):]
        # the reader is slow and the pipe must not wait: this text is lost
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost = True
            log.warning("nobody reads this process's output any more (%s)", error)
        return len(text)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def __del__(self) -> None:
        os.close(self._fd)


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """False: the cursor is never hidden, as a process that is killed could not show it again."""
        return False

    @property  # type: ignore[misc]                         # rich's has a setter, which nobody uses
    def size(self) -> ConsoleDimensions:
        """The size of the window behind the kept file descriptor; rich would ask fds 0 to 2, which point elsewhere."""
        if not self.is_terminal:
            return ConsoleDimensions(PLAIN_WIDTH, 25)
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except OSError:
            columns, lines = 0, 0
        return ConsoleDimensions(columns or 80, lines or 25)    # a pseudo-terminal that was told no size says 0


def page_console(out: TextIO) -> Console:
    """A console for a command that prints and ends. It counts as a terminal only where colours are wanted."""
    coloured = out.isatty() and _shows_more_than_text() and not os.environ.get("NO_COLOR")
    return Console(file=out, force_terminal=coloured, force_jupyter=False, markup=False, emoji=False, highlight=False)


def _shows_more_than_text() -> bool:
    return os.environ.get("TERM") not in (None, "", "dumb", "unknown")


def _console(output: _Output) -> Console:
    is_terminal = output.isatty() and _shows_more_than_text()
    return _Console(file=cast(IO[str], output), force_terminal=is_terminal, force_jupyter=False, markup=False,
                    emoji=False, highlight=False)


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):                       # its reader is gone, or it is closed
            pass
