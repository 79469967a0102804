"""lm-evaluation-harness as a process of its own: whether it is there, how it is started, and what it found."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import HarnessConfig, RunConfig
from dpo_dist.models.load import torch_dtype
from dpo_dist.runtime import child_process
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.world import World

FINDS_IT = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
# what tells a process that it is one rank of several; the harness is alone
OF_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_harness(wanted: HarnessConfig) -> None:
    """UserError where the folder of tasks or lm_eval is missing: known before anything is computed."""
    if not wanted.tasks:
        return
    if wanted.path is not None and not Path(wanted.path).is_dir():
        raise UserError(f"eval.harness.path={wanted.path} is no folder; give the folder of your tasks' YAML files")
    python = wanted.python or sys.executable
    try:
        missing = subprocess.run([python, "-c", FINDS_IT],
                                 stdin=subprocess.DEVNULL, capture_output=True).returncode != 0
    except OSError as error:
        raise UserError(f"eval.harness.python={wanted.python} cannot be started ({error}); give the python of an "
                        "environment that holds lm_eval") from error
    if missing:
        raise UserError(f"eval.harness.tasks needs lm-evaluation-harness, which {python} does not find; pip install "
                        "'dpo-dist[harness]', or set eval.harness.python to the python of an environment that holds it")


def command(config: RunConfig, run_dir: RunDir, world: World) -> list[str]:
    """What is started: lm_eval on the exported model, with the run's dtype and device."""
    wanted, dtype = config.eval.harness, str(torch_dtype(config.model, world.device)).removeprefix("torch.")
    model = f"pretrained={run_dir.model.absolute()},dtype={dtype},trust_remote_code=False"
    return [wanted.python or sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model,
            "--tasks", ",".join(wanted.tasks), "--device", str(world.device), "--output_path", str(run_dir.harness),
            *([] if wanted.path is None else ["--include_path", wanted.path]), *wanted.arguments]


def run_harness(config: RunConfig, run_dir: RunDir, world: World) -> dict[str, Any]:
    """What lm_eval wrote of its results. UserError with its last words where it failed."""
    shutil.rmtree(run_dir.harness, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    if config.run.offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    log = run_dir.logs / "harness.log"
    watcher = child_process.start(command(config, run_dir, world), log, environment)
    try:
        code = watcher.wait()
    finally:
        child_process.stop(watcher)
    written = sorted(run_dir.harness.rglob("results_*.json"))
    if code or not written:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"eval.harness: lm_eval ended with exit code {code}: {words[-1] if words else '(no output)'}; "
                        f"the whole of it is in {log}")
    found = json.loads(written[-1].read_text())
    return {"lm_eval": found.get("lm_eval_version"), "versions": found.get("versions", {}),
            "samples": found.get("n-samples", {}), "results": found["results"]}
