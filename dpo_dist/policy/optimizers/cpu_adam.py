"""cpu_adam: AdamW on state in CPU memory, by DeepSpeed's C++ kernel (ZeRO-Offload, arXiv 2101.06840, section 5.1).

The kernel is compiled once a machine, by one process, as `python -m dpo_dist.policy.optimizers.cpu_adam` does ahead of
a run.
"""
from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder.builder import OpBuilder

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import OptimConfig
from dpo_dist.policy.optimizers.weights import TrainedWeights
from dpo_dist.policy.skip import SkipsOnHost

KERNEL = "cpu_adam"
NO_STEP = 2**40
SECONDS = 1200                             # that compiling may take: 60 on a quiet machine, 600 on a busy one
COMPILE = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"


class CpuAdam(SkipsOnHost, DeepSpeedCPUAdam):
    """The process looks at `found_inf` itself: gradients and state are in its memory anyway."""

    def step(self, closure: Any = None) -> Any:
        # The kernel multiplies its last call's powers of betas by them, and takes the powers themselves after a call of
        # another step. So that a resumed run has the same bits, it is always given such a call, of one element.
        group, element = self.param_groups[0], [torch.zeros(1) for _ in range(4)]
        self.ds_opt_adam.adam_update(self.opt_id, NO_STEP, 0.0, *group["betas"], 1.0, 0.0, True, *element)
        return super().step(closure)


def make_optimizer(optim: OptimConfig, weights: TrainedWeights) -> CpuAdam:
    """UserError where the kernel cannot be compiled."""
    load_kernel()
    return CpuAdam(weights.everything, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)


def load_kernel() -> None:
    """Hands DeepSpeed its kernel, which is compiled first if this machine has none. Processes that come meanwhile
    wait."""
    folder = kernel_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # the system releases it however a compiling process ends; torch's own lock file stays, and would be waited for
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled(folder).exists():
            _compile(folder)
    spec = importlib.util.spec_from_file_location(KERNEL, compiled(folder))
    assert spec is not None and spec.loader is not None
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    OpBuilder._loaded_ops[KERNEL] = kernel               # else DeepSpeed would look for it with torch's lock, and ninja


def kernel_folder() -> Path:
    """Where the kernel is kept: another one for each kind of CPU and version of torch, as home may be shared."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    kind = [flags, sys.version, torch.__version__, deepspeed.__version__]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    return root / f"dpo_dist_{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}"


def compiled(folder: Path) -> Path:
    return folder / KERNEL / f"{KERNEL}.so"


def _compile(folder: Path) -> None:
    """Compiles in a process of its own, which has no GPU and an end."""
    (folder / KERNEL / "lock").unlink(missing_ok=True)               # torch's, which a killed process left
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
    try:
        done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, timeout=SECONDS, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        told = [line for line in done.stdout.splitlines() if "Error" in line]
        why = None if done.returncode == 0 else (told or ["no reason told"])[-1][:300]
    except subprocess.TimeoutExpired:
        why = f"it took more than {SECONDS} s"
    if why is not None:
        compiled(folder).unlink(missing_ok=True)
        raise UserError(f"optim.name=cpu_adam needs DeepSpeed's CPU Adam, which could not be compiled in {folder}: "
                        f"{why}; install g++ and ninja, or set optim=adamw")


if __name__ == "__main__":
    load_kernel()
    print(f"DeepSpeed's CPU Adam is in {compiled(kernel_folder())}")
