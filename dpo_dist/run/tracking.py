"""Where a run's numbers go: always <run.dir>/metrics.jsonl, and, if asked, W&B or TensorBoard. Only the main process has any.

A row is {"step": 12, "split": "train", "loss": 0.61, "rewards/chosen": 0.2, ...}. W&B and TensorBoard show a value as
`train/rewards/chosen` against the step. Values that JSON has no number for stand in metrics.jsonl as the strings "nan", "inf" and
"-inf", which Python's float() reads.
"""
from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig, TrackingConfig, to_dict

log = logging.getLogger(__name__)
MetricsRow = Mapping[str, Any]


class Tracker(Protocol):
    def log(self, row: MetricsRow) -> None:
        """Keeps one row: `step`, `split` and numbers. When it returns, the row in metrics.jsonl survives a kill and a power cut."""

    def finish(self, summary: MetricsRow) -> None:
        """Keeps the run's last numbers, if there are any, and closes."""


def open_tracker(config: RunConfig, run_dir: str | Path, is_main: bool, resumed_step: int) -> Tracker:
    """The run's tracker. Rows after `resumed_step`, which the run is about to make again, are dropped; 0 = from the start, so all.

    Raises UserError where W&B cannot be reached or has no login; it never asks for one.
    """
    if not is_main:
        return Silent()
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(run_dir / "metrics.jsonl", resumed_step)
    if config.tracking.name == "wandb":
        return Both(metrics, Wandb(config, run_dir))
    if config.tracking.name == "tensorboard":
        return Both(metrics, TensorBoard(run_dir, resumed_step))
    return metrics


class Silent:
    """What every process but the main one has."""

    def log(self, row: MetricsRow) -> None:
        pass

    def finish(self, summary: MetricsRow) -> None:
        pass


class Both:
    def __init__(self, first: Tracker, second: Tracker):
        self._trackers = (first, second)

    def log(self, row: MetricsRow) -> None:
        for tracker in self._trackers:
            tracker.log(row)

    def finish(self, summary: MetricsRow) -> None:
        for tracker in self._trackers:
            tracker.finish(summary)


# --------------------------------------------------------------------------------------------------------- metrics.jsonl


class MetricsFile:
    """One JSON object a line. The summary is not kept here: its numbers are rows already."""

    def __init__(self, path: Path, resumed_step: int):
        keep_rows_until(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: MetricsRow) -> None:
        self._file.write(json.dumps({key: _jsonable(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())               # 0.2 ms on a local disk: nothing beside a step

    def finish(self, summary: MetricsRow) -> None:
        self._file.close()


def keep_rows_until(path: Path, step: int) -> None:
    """Drops the rows of `path` after `step` (0 = all rows), and what a kill left half-written; the file is replaced in one go."""
    if not path.exists():
        return
    old = path.read_bytes()
    kept = b"".join(line for line in old.splitlines(keepends=True) if step > 0 and _is_row_until(line, step))
    if kept == old:
        return
    log.info("%s: %d of %d lines stay, up to step %d", path, kept.count(b"\n"), len(old.splitlines()), step)
    _replace(path, kept)


def last_step(path: Path, split: str) -> int | None:
    """The step of the last row of a split in a metrics.jsonl that is whole; None where there is none."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return max((row["step"] for row in rows if row["split"] == split), default=None)


def _is_row_until(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except ValueError:
        log.warning("a line of metrics.jsonl was not whole and is dropped: %r", line[:80])
        return False


def _jsonable(value: Any) -> Any:
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# ------------------------------------------------------------------------------------------------------ W&B, TensorBoard


class Wandb:
    """A W&B run whose id is kept in <run.dir>/wandb_id, so that a resumed run goes on in the same place.

    It is a copy for looking at: a kill takes the rows with it that W&B's own process had not written yet (offline about 15 seconds).
    """

    def __init__(self, config: RunConfig, run_dir: Path):
        import wandb

        t = config.tracking
        if t.mode is None:
            raise UserError("tracking.mode is not set; set tracking.mode=offline or tracking.mode=online")
        if t.mode == "online" and not _logged_in(t):
            raise UserError("tracking.mode=online, but there is no W&B login here; run `wandb login`, or set WANDB_API_KEY, "
                            "or set tracking.mode=offline and send the run later with `wandb sync`")
        try:
            self._run = wandb.init(
                project=t.project, entity=t.entity, mode=t.mode, dir=str(run_dir), id=_wandb_id(run_dir), resume="allow",
                name=run_dir.resolve().name, config=to_dict(config), allow_val_change=True,
                settings=wandb.Settings(console="off"))        # terminal.py decides where stdout and stderr go
        except wandb.Error as error:
            raise UserError(f"tracking.mode={t.mode}: W&B could not start ({error}); set tracking.mode=offline and send the run "
                            "later with `wandb sync`, or set tracking=none") from error
        # W&B drops rows whose own step number it has seen, as after a resume from an older checkpoint; so ours is a value.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: MetricsRow) -> None:
        self._run.log({"step": row["step"], **_named_by_split(row)})

    def finish(self, summary: MetricsRow) -> None:
        import wandb

        self._run.summary.update(dict(summary))
        self._run.finish()
        wandb.teardown()                                # finish() alone may return before the last rows are in the file


def _logged_in(tracking: TrackingConfig) -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:
        raise UserError(f"tracking.mode={tracking.mode}: {error}; set tracking.mode=offline, or run `wandb login` again") from error


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id"
    if not path.exists():
        _replace(path, uuid.uuid4().hex[:8].encode())
    return path.read_text()


class TensorBoard:
    """Event files in <run.dir>/tensorboard. On a resume TensorBoard is told to forget the steps that are made again."""

    def __init__(self, run_dir: Path, resumed_step: int):
        from torch.utils.tensorboard import SummaryWriter

        first_new_step = resumed_step + 1 if resumed_step else 0
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_new_step)

    def log(self, row: MetricsRow) -> None:
        for name, value in _named_by_split(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def finish(self, summary: MetricsRow) -> None:
        if summary:
            self._writer.add_text("summary", "\n".join(f"- {name}: {value}" for name, value in summary.items()))
        self._writer.close()


def _named_by_split(row: MetricsRow) -> dict[str, Any]:
    return {f"{row['split']}/{key}": value for key, value in row.items() if key not in ("step", "split")}
