"""Can torch compute here, and does DeepSpeed load? Separate processes find out; the launcher imports neither."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.doctor.finding import Finding
from dpo_dist.launcher.local import device_count

PROBE_SECONDS = 120                # the first import from a cold network disk is slow
DRIVER = Path("/proc/driver/nvidia/version")
TORCH = """
import json, torch, torch.distributed as dist
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
for i in range(len(gpus)):
    assert torch.ones(8, device=f"cuda:{i}").sum().item() == 8
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "nccl": dist.is_nccl_available(),
                  "gpus": [f"{g.name} ({g.total_memory / 2**30:.0f} GiB)" for g in gpus]}))
"""
DEEPSPEED = """
import json, deepspeed
from deepspeed.git_version_info import installed_ops
print(json.dumps(sorted(name for name, built in installed_ops.items() if built)))
"""


def devices(config: RunConfig) -> Finding:
    seen, error = _ask(TORCH)
    if error:
        return Finding(f"torch does not work: {error}", "install the build of torch that fits this machine's driver "
                                                        "(see pytorch.org)")
    wanted, processes = config.cluster.device, config.cluster.procs_per_node
    if wanted == "cpu":
        return Finding(f"CPU, {len(os.sched_getaffinity(0))} cores; cluster.device=cpu")
    gpus = seen["gpus"]
    if not gpus:
        there = DRIVER.exists() or device_count(config.cluster) > 1
        why = (f"torch {seen['torch']} is a CPU build; install a CUDA build" if seen["cuda"] is None
               else "is the driver older than torch's CUDA, or CUDA_VISIBLE_DEVICES empty?")
        if wanted == "cuda" or there:
            return Finding(f"cluster.device={wanted}, but torch sees no GPU", f"{why}, or set cluster.device=cpu")
        return Finding(f"no GPU; CPU, {len(os.sched_getaffinity(0))} cores")
    if processes and processes > len(gpus):
        return Finding(f"cluster.procs_per_node={processes}, but there are {len(gpus)} GPUs",
                       f"set cluster.procs_per_node={len(gpus)}")
    if not seen["nccl"] and len(gpus) > 1:
        return Finding("torch has no nccl", "install torch's CUDA build from PyPI")
    driver = f", driver {_driver()}" if DRIVER.exists() else ""
    return Finding(f"{len(gpus)} × {gpus[0]}, CUDA {seen['cuda']} of torch{driver}")


def compiled_ops(config: RunConfig) -> Finding | None:
    if config.zero.stage is None and not config.reference.uses_deepspeed:
        return None
    built, error = _ask(DEEPSPEED, **({"DS_ACCELERATOR": "cpu"} if config.cluster.device == "cpu" else {}))
    if error:
        return Finding(f"DeepSpeed does not load: {error}",
                       "DS_BUILD_OPS=0 pip install -c constraints.txt . or set zero=none")
    return Finding(f"none needed; DeepSpeed has {', '.join(built) if built else 'none built'}")


@cache
def _ask(program: str, **environment: str) -> tuple[Any, str | None]:
    """(what the program printed last, as JSON; None), or (None, why it failed), after PROBE_SECONDS at most."""
    try:
        done = subprocess.run([sys.executable, "-c", program],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS,
                              env={**os.environ, **environment})
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_SECONDS} s"
    if done.returncode:
        errors = done.stderr.strip().splitlines()
        return None, errors[-1] if errors else f"exit code {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1]), None


def _driver() -> str:
    """The driver's version: the first word of its own description that is a number."""
    words = DRIVER.read_text().split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
