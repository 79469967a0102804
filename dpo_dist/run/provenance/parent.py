"""The run that a run's starting weights come from, and how run.json is told by one digest."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_dist.models.file_digests import digest_of
from dpo_dist.runtime.json_files import found_object
from dpo_dist.runtime.run_dir import RunDir


def run_digest(content: dict[str, Any]) -> str:
    """Hex digest of all that a run.json says."""
    return digest_of(content)


def parent_run(model_path: str) -> RunDir | None:
    """The run whose export this folder is: <run.dir>/model or <run.dir>/adapter. None for any other model."""
    folder = Path(model_path).expanduser()
    run_dir = RunDir(folder.parent)
    return run_dir if folder.name in (run_dir.model.name, run_dir.adapter.name) and run_dir.run_json.is_file() else None


def parent_of(model_path: str) -> dict[str, Any] | None:
    """The parent's folder name, the digest of its run.json and which export it is, JSON-ready; None without one, or
    where its run.json is damaged."""
    parent = parent_run(model_path)
    if parent is None:
        return None
    content = found_object(parent.run_json)
    if content is None:
        return None
    return {"run": parent.path.resolve().name, "export": Path(model_path).name, "digest": run_digest(content)}
