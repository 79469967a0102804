"""Where a run's numbers come from, written to run.json before the first step."""
from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.run.inputs import Inputs
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.world import World

PACKAGES = ("dpo-dist", "torch", "deepspeed", "transformers", "datasets", "peft")


def provenance(config: RunConfig, inputs: Inputs, world: World) -> dict[str, Any]:
    """Digests of what goes in, versions of what computes, and the shape of the world."""
    return {
        "policy_weights": inputs.policy_digest,
        "reference_weights": inputs.reference_digest if config.loss.needs_reference else None,
        "reference_key": inputs.reference_key.folder if config.loss.needs_reference else None,
        "reference_sync": _sync(config) if config.loss.needs_reference else None,
        "train_pairs": {"count": len(inputs.train), "digest": inputs.train.digest},
        "eval_pairs": {"count": len(inputs.eval), "digest": inputs.eval.digest},
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "attention": inputs.attention,
        "ranks": world.size,
        "device": world.device.type,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _sync(config: RunConfig) -> str:
    """How the reference moves, in words."""
    sync = config.reference.sync
    share = f"alpha {sync.alpha}, " if sync.mode == "soft" else ""
    return "none: frozen" if sync.mode == "none" else f"{sync.mode}: {share}every {sync.every_steps} steps (TR-DPO)"


# what a run cannot change on its way
SAME_RUN = ("policy_weights", "reference_weights", "reference_key", "train_pairs", "dtype")


def check_same_run(run_dir: RunDir, config: RunConfig, lineage: dict[str, Any]) -> None:
    """UserError where the folder holds a run of another config, or of other weights or data under the same names."""
    if not run_dir.run_json.exists():
        return
    before = json.loads(run_dir.run_json.read_text())
    changed = _differences(before["identity_of"], config.identity_dict())
    changed += _differences({k: before["passport"][k] for k in SAME_RUN}, {k: lineage[k] for k in SAME_RUN})
    if changed:
        raise UserError(f"run.dir={run_dir.path} holds another run ({'; '.join(changed[:5])}); choose another run.dir, "
                        "or remove that one")


def write_run(run_dir: RunDir, config: RunConfig, lineage: dict[str, Any]) -> None:
    """Writes run.json."""
    write_json(run_dir.run_json, {"config": to_dict(config), "passport": lineage,
                                  "identity_of": config.identity_dict()})


def _version(package: str) -> str:
    """As installed; a checkout may run without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def add_parity(run_dir: RunDir) -> None:
    """Puts the audit's figures into run.json, once the reference of the run was held against the training stack."""
    content = json.loads(run_dir.run_json.read_text())
    content["passport"]["parity"] = json.loads(run_dir.parity_json.read_text())
    write_json(run_dir.run_json, content)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} was {a}, is now {b}")
    return out
