"""What a node finds wrong with itself before the work: python -m dpo_dist.launcher.node_check [overrides]."""
from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.run_dir import make_for

FREE_GIB = 1.0
NEEDED = ("torch", "deepspeed", "transformers")


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with this node, one sentence a fault."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            yield f"{sys.executable} has no {name}; see cluster.slurm.setup"
    wanted, found = config.cluster.procs_per_node or 1, gpu_count()
    on_gpus = config.cluster.device == "cuda" or (config.cluster.device == "auto" and shutil.which("nvidia-smi"))
    if on_gpus and found < wanted:
        yield f"{found} GPUs answer, {wanted} are needed"
    run_dir = Path(config.run_dir)
    try:
        make_for(run_dir, config.run.readable_by)
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".probe-") as probe:
            probe.write(b"written")
    except OSError as error:
        yield f"run.dir={run_dir} cannot be written: {error}"
        return
    free = shutil.disk_usage(run_dir).free / 2**30
    if free < FREE_GIB:
        yield f"run.dir={run_dir} has {free:.1f} GiB left; a checkpoint needs more"


def gpu_count() -> int:
    """GPUs that the driver can talk to."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"],
                                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def main() -> int:
    try:
        found = list(problems(compose(sys.argv[1:])))
    except UserError as error:
        found = [str(error)]
    print("; ".join(found), end="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
