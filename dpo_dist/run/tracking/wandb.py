"""tracking=wandb: a copy of the rows in Weights & Biases."""
from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import wandb

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking import WandbConfig
from dpo_dist.run.tracking import MetricsRow, SampleRow, named_by_split
from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.run_dir import RunDir

log = logging.getLogger(__name__)


def open_tracker(config: RunConfig, run_dir: Path, resumed_step: int) -> Wandb:
    return Wandb(config, run_dir)


class Wandb:
    """A W&B run whose id is kept in <run.dir>/wandb_id, so that a resumed run goes on in the same place.

    It is only a copy: a kill loses the rows that W&B's own process had not written yet (offline about 15 seconds).
    """

    def __init__(self, config: RunConfig, run_dir: Path):
        t = config.tracking
        assert isinstance(t, WandbConfig)
        if t.mode is None:
            raise UserError("tracking.mode is not set; set tracking.mode=offline or tracking.mode=online")
        if t.mode == "online" and not _logged_in(t):
            raise UserError("tracking.mode=online, but there is no W&B login here; run `wandb login`, or set "
                            "WANDB_API_KEY, or set tracking.mode=offline and send the run later with `wandb sync`")
        try:
            self._run = wandb.init(
                project=t.project, entity=t.entity, mode=t.mode, dir=str(run_dir), id=_wandb_id(RunDir(run_dir)),
                resume="allow", name=run_dir.resolve().name, config=to_dict(config), allow_val_change=True,
                settings=wandb.Settings(console="off"))        # terminal.py decides where stdout and stderr go
        except wandb.Error as error:
            raise UserError(f"tracking.mode={t.mode}: W&B could not start ({error}); set tracking.mode=offline and "
                            "send the run later with `wandb sync`, or set tracking=none") from error
        # W&B drops a row whose step number it has seen already, as happens after a resume from an older checkpoint. So
        # our step is a value of the row, not W&B's own step number.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: MetricsRow) -> None:
        self._run.log({"step": row["step"], **named_by_split(row)})

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        columns = ["prompt", "completion", "tokens", "ended"]
        cells = [[str(row["prompt"]), str(row["completion"]), row["tokens"], row["ended"]] for row in rows]
        self._run.log({"step": step, "samples": wandb.Table(columns=columns, data=cells)})

    def finish(self, summary: MetricsRow) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()
        wandb.teardown()                                # finish() alone may return before the last rows are in the file


def _logged_in(tracking: WandbConfig) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:
        raise UserError(f"tracking.mode={tracking.mode}: {error}; set tracking.mode=offline, or run `wandb login` "
                        "again") from error


def _wandb_id(run_dir: RunDir) -> str:
    known = run_dir.wandb_id.read_text(errors="replace") if run_dir.wandb_id.exists() else None
    if known is None or not re.fullmatch("[0-9a-f]{8}", known):
        if known is not None:
            log.warning("%s is damaged; W&B's copy of this run goes on in a new one", run_dir.wandb_id)
        known = uuid.uuid4().hex[:8]
        write_atomic(run_dir.wandb_id, known)
    return known
