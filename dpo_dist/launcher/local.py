"""Runs stages as processes on this machine. Torch is started, never imported."""
from __future__ import annotations

import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.cluster import ClusterConfig
from dpo_dist.config.errors import UserError
from dpo_dist.launcher.plan import LaunchPlan, Stage

TAIL_LINES = 20
SECONDS_BETWEEN_LOOKS = 0.2        # at signals, and at stages that run side by side
SIGNALS_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SECONDS_FOR_SURVIVORS = "10"       # that the ranks beside a failed one get before they are killed


def device_count(cluster: ClusterConfig) -> int:
    """GPUs that the processes would see; 1 where the work is done on the CPU."""
    return max(1, len(devices(cluster)))


def devices(cluster: ClusterConfig) -> list[str]:
    """The GPUs that the processes would see, as CUDA_VISIBLE_DEVICES names them; empty where the work is done on the CPU."""
    if cluster.device == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d.strip() for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def run_stages(plan: LaunchPlan) -> int:
    """Runs the stages in turn until one fails or is stopped; the exit code of the last one run, 0 only when its work is done.

    A signal to end goes to the ranks, which save first (runtime/preemption.py), and starts no further stage. A second Ctrl-C kills them.
    """
    names = [stage.name for stage in plan.stages]
    with noting_signals(*SIGNALS_TO_END) as asked:
        for stage in plan.stages:
            if stage.beside in names:
                continue
            if asked:
                return _ended_early(asked, f"before the {stage.name} stage")
            code = run_stage(stage, Path(plan.run_dir), [each for each in plan.stages if each.beside == stage.name], asked)
            if code:
                return code
    return 0


def run_stage(stage: Stage, run_dir: Path, servants: Sequence[Stage], asked: Sequence[int]) -> int:
    """Starts the stage, beside its servants, and waits. What it tells a person passes through; what libraries say goes to
    <run.dir>/logs/launcher.log, and so does all that servants say to theirs. The exit code is the stage's own. `asked`: see noting_signals."""
    total = stage.procs_per_node + sum(each.procs_per_node for each in servants)
    beside: list[_Started] = []
    try:
        for each in servants:
            beside.append(_start(each, Path(each.run_dir), total, quiet=True))
        started = _start(stage, Path(stage.run_dir or run_dir), total)
        code = _wait(started, beside, asked)
    finally:
        for servant in beside:
            _end(servant)
    if (started.run_dir / "PREEMPTED").exists():
        return 128 + int(json.loads((started.run_dir / "PREEMPTED").read_text())["signal"])
    if code and asked and _ended_by(asked, started, code):
        (started.run_dir / "FAILED").unlink(missing_ok=True)             # of a rank that only saw another one go
        return _ended_early(asked, f"in the {stage.name} stage")
    return _report_failure(stage, started.run_dir, code, started.said()) if code else 0


@dataclass(frozen=True)
class _Started:
    stage: Stage
    run_dir: Path
    process: subprocess.Popen[bytes]
    log_begins: int                    # in launcher.log

    def said(self) -> str:
        return (self.run_dir / "logs" / "launcher.log").read_bytes()[self.log_begins:].decode(errors="replace")

    def ranks(self) -> list[int]:
        """The ranks' process ids."""
        return [self.process.pid] if self.stage.ranks == 1 else _children(self.process.pid)


def _start(stage: Stage, run_dir: Path, procs_on_machine: int, quiet: bool = False) -> _Started:
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be made: {error}; set run.dir to a folder that can be written") from error
    for marker in ("DONE", "FAILED", "PREEMPTED") if stage.beside else ("FAILED", "PREEMPTED"):
        (run_dir / marker).unlink(missing_ok=True)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // procs_on_machine)),
                   "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SECONDS_FOR_SURVIVORS, **os.environ, "PYTHONUNBUFFERED": "1"}
    if stage.devices is not None:
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[d] if visible else str(d) for d in stage.devices)
    with (logs / "launcher.log").open("ab") as log:
        already = log.tell()
        # in a session of its own, so that a Ctrl-C comes to this process alone, which passes it on to the ranks and not to torchrun
        process = subprocess.Popen(command(stage), stdout=log if quiet else None, stderr=log, env=environment, start_new_session=True)
    return _Started(stage, run_dir, process, already)


def _wait(started: _Started, servants: Sequence[_Started], asked: Sequence[int]) -> int:
    """The exit code. Signals are passed on meanwhile. A servant that ends before its work is done is marked FAILED, which the stage will
    see: it goes as far as it can."""
    serving, passed = list(servants), 0
    while True:
        try:
            return started.process.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            if len(asked) > passed and _pass_on(asked[passed:], asked.count(signal.SIGINT) > 1, [started, *serving]):
                passed = len(asked)
            for servant in [each for each in serving if each.process.poll() is not None]:
                serving.remove(servant)
                if not (servant.run_dir / "DONE").exists() and not (servant.run_dir / "FAILED").exists():
                    _mark_failed(servant.run_dir, f"the {servant.stage.name} stage ended with code {servant.process.returncode}; "
                                                  f"its logs are in {servant.run_dir}/logs")


def _end(servant: _Started) -> None:
    """Asks a servant to keep what it has and to end; kills it where it does not."""
    if servant.process.poll() is None:
        for rank in servant.ranks():
            _send(rank, signal.SIGTERM, os.kill)
        try:
            servant.process.wait(float(SECONDS_FOR_SURVIVORS))
        except subprocess.TimeoutExpired:
            _kill(servant)


def _kill(started: _Started) -> None:
    for leader in {*started.ranks(), started.process.pid}:                # each leads a session of its own, with all that it started
        _send(leader, signal.SIGKILL, os.killpg)


def command(stage: Stage) -> list[str]:
    """The command line of a stage: python alone for one process, torchrun for several."""
    module = ["-m", stage.module, *stage.overrides]
    if stage.ranks == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(stage.procs_per_node), "--master-addr", "127.0.0.1",
            "--master-port", str(_free_port()), *module]


# -------------------------------------------------------------------------------------------------------------- signals


@contextmanager
def noting_signals(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Those of these signals that came meanwhile, in order; one that is ignored (nohup) stays so. Noted, not raised: an exception in the
    middle of a start would lose the process."""
    asked: list[int] = []
    former = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number, handler in former.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number in heard:
            signal.signal(number, former[number])


def _pass_on(numbers: Sequence[int], at_once: bool, running: Sequence[_Started]) -> bool:
    """Whether it could be done: a torchrun that has not started its ranks yet is about to. Not torchrun itself is told, as it would give its
    ranks 30 seconds and kill them."""
    if at_once:
        for each in running:
            _kill(each)
        return True
    told = [each.ranks() for each in running if each.process.poll() is None]
    if not all(told):
        return False
    if signal.SIGINT in numbers:
        print("stopping after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr, flush=True)
    for rank in [rank for ranks in told for rank in ranks]:
        for number in numbers:
            _send(rank, _sent(number), os.kill)
    return True


def _ended_by(asked: Sequence[int], started: _Started, code: int) -> bool:
    """Whether a signal that was passed on ended the stage itself, which was not listening yet or is one that has nothing to save."""
    killed = _killed_rank(started.said())
    number = killed[1] if killed else max(0, -code)
    sent = {_sent(each) for each in asked} | ({signal.SIGKILL} if asked.count(signal.SIGINT) > 1 else set())
    return number in sent if number else not (started.run_dir / "FAILED").exists()


def _sent(number: int) -> int:
    """The signal that the ranks are sent for it: they do not know HUP."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _ended_early(asked: Sequence[int], where: str) -> int:
    print(f"ended by {signal.Signals(asked[0]).name} {where}; the same command goes on from there", file=sys.stderr)
    return 128 + asked[0]


def _children(pid: int) -> list[int]:
    return [int(child) for thread in Path(f"/proc/{pid}/task").glob("*/children") for child in thread.read_text().split()]


def _send(pid: int, number: int, how: Callable[[int, int], None]) -> None:
    try:
        how(pid, number)
    except ProcessLookupError:
        pass                                             # it has ended by itself


# -------------------------------------------------------------------------------------------------------------- failures


def _report_failure(stage: Stage, run_dir: Path, code: int, said: str) -> int:
    """Tells the person which rank failed, why, and where to read on; the exit code. What the ranks tell themselves, they have told."""
    killed = _killed_rank(said)
    if killed is not None:                               # it could not speak; what the others say is only that it is gone
        rank, number = killed
        message = f"rank {rank} was ended by {signal.Signals(number).name}" + (" (by the system, where memory ran out)" if number == 9 else "")
        _mark_failed(run_dir, message)
        print("\n".join([*_tail(run_dir / "logs" / f"rank-{rank}.log"), f"error: {message}; its log is {run_dir}/logs/rank-{rank}.log"]),
              file=sys.stderr)
        return 1
    if (run_dir / "FAILED").exists():
        told = json.loads((run_dir / "FAILED").read_text())
        if told["exit_code"] == 1:
            print("\n".join(_tail(run_dir / "logs" / f"rank-{told['rank']}.log")), file=sys.stderr)
        print(f"error: {told['message']}", file=sys.stderr)
        return int(told["exit_code"])
    told_early = [line for line in said.splitlines() if line.startswith("error: ")]      # before there was a folder to leave a marker in
    if told_early:
        print(told_early[-1], file=sys.stderr)
        return 2
    lines = said.splitlines()[-TAIL_LINES:]
    print("\n".join([*lines, f"error: the {stage.name} stage ended with code {code}; its logs are in {run_dir}/logs"]), file=sys.stderr)
    return code if 0 < code < 256 else 1


def _mark_failed(run_dir: Path, message: str) -> None:
    (run_dir / "FAILED").write_text(json.dumps({"message": message, "exit_code": 1}))


def _killed_rank(said: str) -> tuple[int, int] | None:
    """(rank, signal) where torchrun reports that a signal ended the first rank to fail. Ranks that it found ended in one look have no
    order, and it calls the lowest the first: a rank that was killed comes before those that only saw it go. Later signals are torchrun's
    own, and ABRT is how NCCL gives up on a lost rank."""
    failures = re.findall(r"time +: (\d+-\d+-\d+_[\d:]+)\n.*?\brank +: (\d+) .*?\bexitcode +: (-?\d+)", said, re.S)
    if not failures:
        return None
    first, *others = [(_seconds(at), int(rank), -int(code)) for at, rank, code in reversed(failures)]           # the root cause stands last
    at_once = [each for each in others if each[0] - first[0] <= 1 and each[2] not in (signal.SIGTERM, signal.SIGABRT)]
    return next(((rank, number) for _, rank, number in [first, *at_once] if number > 0), None)


def _seconds(torchruns_time: str) -> float:
    return time.mktime(time.strptime(torchruns_time, "%Y-%m-%d_%H:%M:%S"))


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
