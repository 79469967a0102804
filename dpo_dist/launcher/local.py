"""Runs stages as processes on this machine. Torch is started, never imported."""
from __future__ import annotations

import glob
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config import ClusterConfig, UserError
from dpo_dist.launcher.plan import Stage

TAIL_LINES = 20


def device_count(cluster: ClusterConfig) -> int:
    """GPUs that the processes would see; 1 where the work is done on the CPU."""
    if cluster.device == "cpu":
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"]))
    return max(1, len(glob.glob("/dev/nvidia[0-9]*")))


def run_stages(stages: Sequence[Stage], run_dir: Path) -> int:
    """Runs the stages in turn until one fails; the exit code of the last one run."""
    for stage in stages:
        code = run_stage(stage, run_dir)
        if code:
            return code
    return 0


def run_stage(stage: Stage, run_dir: Path) -> int:
    """Starts the stage and waits. What it tells a person passes through; what libraries say goes to <run.dir>/logs/launcher.log."""
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be made: {error}; set run.dir to a folder that can be written") from error
    failed = run_dir / "FAILED"
    failed.unlink(missing_ok=True)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // stage.processes)), **os.environ, "PYTHONUNBUFFERED": "1"}
    with (logs / "launcher.log").open("ab") as log:
        already = log.tell()
        process = subprocess.Popen(command(stage), stderr=log, env=environment)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())    # what ends the launcher ends what it started
        try:
            code = process.wait()
        except KeyboardInterrupt:                        # the processes got it too: let them end by themselves
            process.wait()
            code = 130
    if code == 0:
        return 0
    if failed.exists():
        told = json.loads(failed.read_text())
        print(f"error: {told['message']}", file=sys.stderr)
        return int(told["exit_code"])
    said = (logs / "launcher.log").read_bytes()[already:].decode(errors="replace").splitlines()
    told_early = [line for line in said if line.startswith("error: ")]       # before there was a folder to leave a marker in
    if told_early:
        print(told_early[-1], file=sys.stderr)
        return 2
    print("\n".join([*said[-TAIL_LINES:], f"error: the {stage.name} stage ended with code {code}; its logs are in {logs}"]), file=sys.stderr)
    return code if 0 < code < 256 else 1


def command(stage: Stage) -> list[str]:
    """The command line of a stage: python alone for one process, torchrun for several."""
    module = ["-m", stage.module, *stage.overrides]
    if stage.processes == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(stage.processes), "--master-addr", "127.0.0.1",
            "--master-port", str(_free_port()), *module]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
