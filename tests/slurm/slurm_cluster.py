"""A real Slurm of three nodes, and the real command in its environment."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import REPO

TESTBED = Path(__file__).parent / "testbed.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")


@dataclass(frozen=True)
class Slurm:
    """A running test bed."""

    environment: dict[str, str]

    def call(self, *words: object, code: int | None = 0) -> str:
        """What a command prints. With code=None it may fail."""
        done = subprocess.run([str(word) for word in words], env=self.environment, cwd=REPO, capture_output=True,
                              text=True, timeout=120)
        assert code is None or done.returncode == code, (
            f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    def dpo_dist(self, *words: object, code: int = 0) -> str:
        return self.call(sys.executable, "-m", "dpo_dist.launcher.cli", *words, code=code)

    def submit(self, verb: str, words: Sequence[str]) -> dict[str, str]:
        """{stage: job id} of `dpo-dist VERB cluster=slurm`."""
        lines = self.dpo_dist(verb, *words).splitlines()
        return {line.split()[1].rstrip(":"): line.split()[-1] for line in lines if line.startswith("submitted ")}

    def testbed(self, *words: object) -> None:
        self.call("bash", TESTBED, *words)

    def show(self, job: str, field: str) -> str:
        """A field of `scontrol show job`, such as JobState or Restarts."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.removeprefix(f"{field}=") for word in words if word.startswith(f"{field}="))

    def until(self, what: str, true: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what} did not happen\n{self.call('scontrol', 'show', 'job')}"
            time.sleep(0.3)

    def until_state(self, job: str, *states: str, seconds: float = 240, start_now: bool = False) -> None:
        """Waits for one of these states. `start_now`: a requeued job does not wait the two minutes that Slurm gives it,
        only the seconds within which a second start would be refused ("job credential revoked")."""
        pending_since: float | None = None

        def there() -> bool:
            nonlocal pending_since
            state = self.show(job, "JobState")
            pending_since = (pending_since or time.monotonic()) if state == "PENDING" else None
            if start_now and pending_since and time.monotonic() - pending_since > 3:
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", code=None)
            return state in states

        self.until(f"job {job} in {states}", there, seconds)

    @classmethod
    def start(cls, state: Path) -> Slurm:
        """Brings the test bed up; its files are in `state`. Several may run beside each other."""
        number = os.getpid() % 200
        cluster = cls({**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "STATE": str(state),
                       "TAG": f"d{number}", "NET": f"10.77.{number}", "PORT": str(16000 + number),
                       "SLURM_CONF": str(state / "slurm.conf"), "OMP_NUM_THREADS": "1"})
        up = subprocess.run(["bash", str(TESTBED), "up", "3"], env=cluster.environment, stdin=subprocess.DEVNULL,
                            capture_output=True, text=True)
        if up.returncode:
            cluster.stop()
            raise RuntimeError(f"Slurm did not start: {up.stdout}{up.stderr}")
        return cluster

    def stop(self) -> None:
        self.call("scancel", "--user=root", code=None)
        self.testbed("down")
