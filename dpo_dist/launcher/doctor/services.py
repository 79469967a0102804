"""What a run talks to outside itself: W&B and Slurm. None where the run does not."""
from __future__ import annotations

import netrc
import os
import shutil
import socket
import subprocess
from urllib.parse import urlsplit

from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking import WandbConfig
from dpo_dist.launcher.doctor.finding import Finding
from dpo_dist.launcher.doctor.versions import installed

ANSWER_SECONDS = 5
WANDB_URL = "https://api.wandb.ai"


def wandb(config: RunConfig) -> Finding | None:
    if not isinstance(config.tracking, WandbConfig):
        return None
    version = installed("wandb")
    if version is None:
        return Finding("tracking=wandb, but wandb is not installed",
                       "pip install -c constraints.txt . or set tracking=none")
    if config.tracking.mode != "online":
        return Finding(f"wandb {version}, offline: `wandb sync` sends the run later")
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB_URL)
    host = url.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return Finding(f"tracking.mode=online, but there is no login for {host}",
                       "run `wandb login`, set WANDB_API_KEY, or set tracking.mode=offline")
    try:
        port = url.port or {"http": 80}.get(url.scheme, 443)
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS):
            return Finding(f"wandb {version}, online: {host} answers, a login is there")
    except OSError as error:
        return Finding(f"tracking.mode=online, but {host} does not answer: {error}",
                       "open the way there, or set tracking.mode=offline")


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def slurm(config: RunConfig) -> Finding | None:
    """Red only where the run goes through Slurm: elsewhere a controller that does not answer stops nothing."""
    wanted = config.cluster.submits
    if not wanted and shutil.which("sinfo") is None:
        return None
    partitions, error = _sinfo()
    if error is None:
        return Finding(partitions)
    if not wanted:
        return Finding(f"{error}; only cluster=slurm needs it")
    return Finding(f"cluster=slurm, but {error}", "run this where jobs can be submitted (slurmctld up, munge running), "
                                                  "or set cluster=local")


def _sinfo() -> tuple[str, str | None]:
    """(the partitions with their nodes and states, None), or ("", why there are none to see)."""
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%R %D %t"],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        return "", "there is no sinfo here"
    except subprocess.TimeoutExpired:
        return "", f"sinfo gave no answer within {ANSWER_SECONDS} s"
    if done.returncode:
        return "", (done.stderr.strip() or "sinfo: failed").splitlines()[0]
    rows = [line.split() for line in done.stdout.splitlines()]
    shown = ", ".join(f"{name} ({nodes} nodes {state})" for name, nodes, state in rows)
    return shown, None if rows else "sinfo lists no partition"
