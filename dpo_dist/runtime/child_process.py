"""A process that ends when this one does, however that happens: a watcher between them holds a pipe, and sees it close.

Neither `atexit` nor `finally` runs in a process that is killed, and a forgotten server keeps its GPU.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 10.0                     # between asking a process to end and killing it


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The watcher of a process that runs `command`, with both outputs appended to `log`. It exits with the process's
    code."""
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "dpo_dist.runtime.child_process", *command],
                                stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=dict(environment),
                                start_new_session=True)


def stop(watcher: subprocess.Popen[bytes]) -> None:
    """Returns when the process and all that it started have ended."""
    assert watcher.stdin is not None
    watcher.stdin.close()
    watcher.wait()


def main(command: Sequence[str]) -> int:
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", flush=True)
        return 127

    def end_with_the_pipe() -> None:
        # read() returns b"" once the other end is closed. Not sys.stdin: a waiting thread would keep its lock.
        while os.read(0, 1024):
            pass
        _end(process)

    # in a thread: this one is inside wait(), which holds a lock that _end() needs
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_end, args=[process], daemon=True).start())
    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    code = process.wait()
    _signal(process, signal.SIGKILL)                     # what it started and left behind
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process, signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:                           # all of them have ended
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
