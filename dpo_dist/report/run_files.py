"""What a run's folder holds, read when it is asked for. Every file may be missing: the run may be old, or under way."""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.json_files import SEAL, is_whole, needed_object
from dpo_dist.runtime.json_lines import whole_and_broken
from dpo_dist.runtime.run_dir import RunDir

Row = dict[str, Any]


class RunFiles:
    """A run's files by name. What is missing is None, or empty where it is a list."""

    def __init__(self, folder: str | Path, name: str = ""):
        self.folder = RunDir(folder)
        self.name = name or self.folder.path.resolve().name
        self.unread: dict[str, int] = {}         # {file: lines that are not JSON}, of the files read so far

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def is_one(self) -> bool:
        """Whether the folder holds anything of a run that a report could show."""
        return any(path.is_file() for path in (
            self.folder.run_json, self.folder.metrics, self.folder.audit_json, self.folder.evaluation_json,
            self.folder.datamap_json, self.folder.samples))

    @cached_property
    def config(self) -> Row:
        return (self._json(self.folder.run_json) or {}).get("config") or {}

    @cached_property
    def passport(self) -> Row:
        return (self._json(self.folder.run_json) or {}).get("passport") or {}

    @cached_property
    def _metrics(self) -> list[Row]:
        # of a step that was made again after a kill, the last row
        rows = {(row.get("split"), row.get("step")): row for row in self._lines(self.folder.metrics)
                if isinstance(row.get("step"), int)}
        return sorted(rows.values(), key=lambda row: row["step"])

    @cached_property
    def training(self) -> list[Row]:
        """Rows of metrics.jsonl by step."""
        return [row for row in self._metrics if row.get("split") == "train"]

    @cached_property
    def held_out(self) -> list[Row]:
        """Rows of metrics.jsonl by step."""
        return [row for row in self._metrics if row.get("split") == "eval"]

    @cached_property
    def evaluations(self) -> list[Row]:
        """Summaries of evaluation.json by step."""
        found = (self._json(self.folder.evaluation_json) or {}).get("evaluations")
        whole = [one for one in found if isinstance(one, dict) and isinstance(one.get("step"), int)] if isinstance(
            found, list) else []
        return sorted(whole, key=lambda summary: summary["step"])

    @cached_property
    def audit(self) -> Row | None:
        return self._json(self.folder.audit_json)

    @cached_property
    def datamap(self) -> Row | None:
        return self._json(self.folder.datamap_json)

    @cached_property
    def generations(self) -> Row | None:
        return self._json(self.folder.generations_json)

    @cached_property
    def judge(self) -> Row | None:
        return self._json(self.folder.judge_json)

    @cached_property
    def guard(self) -> list[Row]:
        return self._lines(self.folder.guard)

    @cached_property
    def samples(self) -> list[Row]:
        return self._lines(self.folder.samples)

    @cached_property
    def command(self) -> str:
        """What was typed; empty where no file says so."""
        path = self.folder.command
        return path.read_text(errors="replace").strip() if path.is_file() else ""

    @cached_property
    def data_summary(self) -> str:
        path = self.folder.data_summary
        return path.read_text(errors="replace").rstrip() if path.is_file() else ""

    @property
    def last_evaluation(self) -> Row | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def last_step(self) -> int:
        return max((rows[-1]["step"] for rows in (self.training, self.held_out) if rows), default=0)

    @property
    def beta(self) -> float | None:
        return number((self.config.get("loss") or {}).get("beta"))

    def _json(self, path: Path) -> Row | None:
        """UserError for a file that is no JSON object: these are written whole or not at all."""
        if not path.is_file():
            return None
        found = needed_object(path, "remove it, or make it again")
        if SEAL in found and not is_whole(found):
            raise UserError(f"{path} is damaged: its digest is another; remove it, or make it again")
        return found

    def _lines(self, path: Path) -> list[Row]:
        """The objects of a file of lines. A last line may be half written: it is left out, as is any that a kill
        cut."""
        rows, broken = whole_and_broken(path)
        if broken:
            self.unread[path.name] = broken
        return rows


def read_runs(folders: Sequence[str | Path]) -> list[RunFiles]:
    """The runs in these folders, with names that tell them apart. UserError for a folder that holds none."""
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    runs = [RunFiles(path, name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}")
            for path, name in zip(paths, names, strict=True)]
    for run in runs:
        if not run.is_one:
            what = "holds nothing of a run (no run.json, no metrics.jsonl)" if run.path.is_dir() else "is no folder"
            raise UserError(f"{run.path} {what}; give the run.dir of a run or a sweep, as in: dpo-dist report "
                            "runs/my-run")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError(f"the same run is given twice: {', '.join(map(str, folders))}; give each once")
    return runs


def number(value: Any) -> float | None:
    """The value as a finite float; None where it is none. metrics.jsonl has text for what JSON has no number for."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
