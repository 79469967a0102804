"""A process that has imported everything, and forks the processes of a command: what `dpo_dist(...)` of conftest.py
runs on.

Importing torch, transformers and DeepSpeed takes five seconds a process, which is most of a short run. A forked process
has done that already. All else is real: the launcher, its ranks in sessions of their own, their logs, signals and exit
codes. Forked instead of started are `python -m dpo_dist...`, and the programs that a test hands over (`forked`,
`forked_ranks` of conftest.py). What only a fresh process can show (imports, a terminal's Ctrl-C, torchrun) is tested
with `subprocess`.

    python tests/template.py SOCKET        serves until its standard input is closed
"""
from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORKED = ("dpo_dist.launcher.cli", "dpo_dist.launcher.node", "dpo_dist.runtime.rank")
IMPORTED = ("torch", "torch._dynamo", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
            "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
            "transformers.models.qwen2.modeling_qwen2", "deepspeed", "peft", "accelerate", "torch.utils.tensorboard",
            "dpo_dist.train", "dpo_dist.score", "dpo_dist.evaluate", "dpo_dist.export", "dpo_dist.policy.zero",
            "dpo_dist.reference.zero", "dpo_dist.reference.tensor_parallel", "dpo_dist.reference.vllm",
            "dpo_dist.run.tracking.tensorboard", "dpo_dist.launcher.cli", "dpo_dist.launcher.node",
            # what a run imports only once it needs it
            "pandas", "pyarrow.compute", "pyarrow.parquet", "transformers.conversion_mapping")
# beside the socket: a file for each forked process, named by its id, with its words and rank
PROCESSES = "processes"
start_process = subprocess.Popen


class ForkedProcess:
    """As subprocess.Popen of `python -m MODULE words`, as far as the launcher uses it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], stdout: Any, stderr: Any,
                 new_session: bool, stdin: int | None = None):
        self.args, self.returncode = words, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, environment, stdout, stderr, new_session, stdin)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        assert timeout is None, "nobody here waits for a time"
        return self._reap(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _reap(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def popen(command: Sequence[str], **how: Any) -> Any:
    """subprocess.Popen, but for the commands that are forked."""
    words = [os.fspath(word) for word in command] if not isinstance(command, str) else []
    if words[:2] == [sys.executable, "-m"] and words[2] in FORKED and how.get("stdin") in (None, subprocess.DEVNULL) \
            and not {"cwd", "preexec_fn"} & how.keys():
        return ForkedProcess(words[2:], how.get("env") or os.environ, how.get("stdout"), how.get("stderr"),
                             how.get("start_new_session", False), how.get("stdin"))
    return start_process(command, **how)


def _become(words: Sequence[str], environment: Mapping[str, str], stdout: Any, stderr: Any, new_session: bool,
            stdin: int | None) -> None:
    """This forked process is `python -m` with these words from here on; it never returns."""
    code = 1
    try:
        if new_session:
            os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if stdin == subprocess.DEVNULL:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = None if stdout is None else stdout.fileno()
        err = out if stderr == subprocess.STDOUT else None if stderr is None else stderr.fileno()
        for target, source in ((1, out), (2, err)):
            if source is not None:
                os.dup2(source, target)
        os.environ.clear()
        os.environ.update(environment)
        import torch

        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
        known = {"words": words, "rank": environment.get("RANK")}
        (FOLDER / PROCESSES / str(os.getpid())).write_text(json.dumps(known))
        _run(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: Sequence[str]) -> None:
    """As `python` with these words, after `-m` where they begin with a module."""
    sys.argv = list(words)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0].endswith(".py"):
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _answer(connection: socket.socket) -> None:
    """Runs one command in a process of its own, tells its id and then its exit code."""
    request = json.loads(connection.makefile().readline())
    os.chdir(request["cwd"])
    with open(request["stdout"], "wb") as stdout, open(request["stderr"], "wb") as stderr:
        process = ForkedProcess(request["words"], request["environment"], stdout, stderr, new_session=True)
    connection.sendall(f"{process.pid}\n".encode())
    connection.sendall(f"{process.wait()}\n".encode())


def serve(path: str) -> None:
    for name in IMPORTED:
        __import__(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from dpo_dist.config.compose import compose
    from dpo_dist.runtime.world import prepare_deepspeed

    prepare_deepspeed(torch.device("cpu"))
    get_checkpoint_conversion_mapping("llama")           # made by the first call, with hundreds of patterns
    compose(["model.path=m"])                            # as is the parser of overrides
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    subprocess.Popen = popen  # type: ignore[misc, assignment]
    gc.collect()
    gc.freeze()                                          # a collection in a forked process would copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)        # nobody waits for those who answer
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen(64)
        os.rename(f"{path}.new", path)                   # who finds it can connect
        while True:
            ready, _, _ = select.select([server, 0], [], [])
            if 0 in ready:
                return                                   # who started this has gone
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                try:
                    _answer(connection)
                finally:
                    os._exit(0)
            connection.close()


class Started:
    """A forked command, as subprocess.Popen with its output in files."""

    def __init__(self, words: list[str], connection: socket.socket, out: Path, err: Path):
        self.args, self.out, self.err, self.returncode = words, out, err, None
        self._connection, self._answers = connection, connection.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0, self.out.read_bytes(), self.err.read_bytes())
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr), once it has ended."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)


class Template:
    """The running template, as tests see it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        self._folder, self._socket, self._count = folder, str(folder / "socket"), 0
        (folder / PROCESSES).mkdir()
        self._process = start_process([sys.executable, __file__, self._socket], stdin=subprocess.PIPE,
                                      env=dict(environment))
        while not Path(self._socket).exists():
            assert self._process.poll() is None, "the template did not start"
            select.select([], [], [], 0.05)

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, words: Sequence[str], environment: Mapping[str, str], cwd: Path) -> Started:
        """A module, a file (*.py) or `-c CODE` with its arguments, as a process that leads a session of its own."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._socket)
        request = {"words": list(words), "environment": dict(environment), "cwd": str(cwd), "stdout": str(out),
                   "stderr": str(err)}
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Started(list(words), connection, out, err)

    def processes(self) -> Iterator[tuple[int, list[bytes], str | None]]:
        """(id, words, rank) of every forked process that lives. Their command lines and environments in /proc are the
        template's."""
        for entry in (self._folder / PROCESSES).iterdir():
            try:
                # empty where it has ended and is not yet reaped
                if Path(f"/proc/{entry.name}/cmdline").read_bytes():
                    known = json.loads(entry.read_text())
                    yield int(entry.name), [os.fsencode(word) for word in known["words"]], known["rank"]
            except (OSError, ValueError):                # it has ended, or has only begun
                continue

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1]).parent
    serve(sys.argv[1])
