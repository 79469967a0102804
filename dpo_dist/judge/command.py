"""A judge that is a command: JSON lines on its stdin, JSON lines from its stdout."""
from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from dpo_dist.config.errors import UserError

SHOWN_CHARACTERS = 500                   # of what it wrote to its stderr, the last


@dataclass(frozen=True)
class Command:
    """Started for each list of questions, and gone once they are answered."""

    words: tuple[str, ...]
    key: str
    timeout_seconds: float

    @property
    def name(self) -> str:
        return shlex.join(self.words)

    def check(self) -> None:
        """UserError where there is no such program."""
        if not self.words or shutil.which(self.words[0]) is None:
            raise UserError(f"{self.key}={list(self.words)} cannot be started: there is no program "
                            f"'{self.words[0] if self.words else ''}'; give the program and its arguments, as in "
                            f"{self.key}=[python,judge.py]")

    def ask(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        """The objects of its stdout, as they come. UserError where it fails, is silent for too long, or writes what is
        no JSON."""
        self.check()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                                       start_new_session=True)
            try:
                for line in self._lines(process, rows):
                    yield self._object(line)
                if code := process.wait(self.timeout_seconds):
                    raise UserError(f"{self.key}={self.name} ended with exit code {code}: {_end(said)}")
            except subprocess.TimeoutExpired as error:
                raise self._silent() from error
            finally:
                _kill(process)

    def _lines(self, process: subprocess.Popen[bytes], rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
        """What it writes, while another thread writes the questions: neither pipe can be full and block the other."""
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_tell, args=[process.stdin, rows], daemon=True).start()
        threading.Thread(target=_hear, args=[process.stdout, lines], daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=self.timeout_seconds)
            except queue.Empty as error:
                raise self._silent() from error
            if line is None:
                return
            if line.strip():
                yield line

    def _object(self, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            text = line[:200].decode(errors="replace").strip()
            raise UserError(f"{self.key}={self.name} wrote a line that is no JSON: {text!r}; its stdout is for answers "
                            "alone, what a person should read goes to stderr") from error

    def _silent(self) -> UserError:
        return UserError(f"{self.key}={self.name} gave no answer for {self.timeout_seconds:g} s; set "
                         f"{self.key.rpartition('.')[0]}.timeout_seconds higher, or let it flush each answer")


def _tell(stdin: IO[bytes], rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        with stdin:
            for row in rows:
                stdin.write(json.dumps(row).encode() + b"\n")
    except OSError:                                      # it has ended: its exit code tells more
        pass


def _hear(stdout: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _end(said: IO[bytes]) -> str:
    """The last of what it wrote to its stderr, in a line."""
    said.seek(0)
    words = " ".join(said.read().decode(errors="replace").split())
    return words[-SHOWN_CHARACTERS:] or "(nothing on its stderr)"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends it with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
