"""RunDir: every name in a run's folder, and what its markers say. No torch here: the launcher uses it too."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.files import write_atomic

DONE, PREEMPTED, FAILED = "DONE", "PREEMPTED", "FAILED"
COMPLETE = "COMPLETE"                  # in a checkpoint's folder, written last


@dataclass(frozen=True)
class Failure:
    """What a FAILED marker says."""

    message: str
    exit_code: int = 1
    rank: int = 0
    node: int = 0


@dataclass(frozen=True)
class RunDir:
    path: Path

    def make(self) -> None:
        """Makes the folder, with that of its logs. UserError where that cannot be."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be made: {error}; set run.dir to a folder that can be "
                            "written") from error

    # ---------------------------------------------------------------------------------------------------------- results

    @property
    def run_json(self) -> Path:
        """The resolved config and where the run's numbers come from."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """What from_pretrained loads."""
        return self.path / "model"

    @property
    def eval_json(self) -> Path:
        return self.path / "eval.json"

    @property
    def parity_json(self) -> Path:
        """The audit of a served reference."""
        return self.path / "parity.json"

    @property
    def data_summary(self) -> Path:
        return self.path / "data.txt"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """The folders of whole checkpoints, oldest first."""
        return sorted(marker.parent for marker in self.path.glob(f"checkpoints/step-*/{COMPLETE}"))

    # ------------------------------------------------------------------------------------------------------------- logs

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    @property
    def launcher_log(self) -> Path:
        return self.logs / "launcher.log"

    def node_log(self, node: int) -> Path:
        return self.logs / f"node-{node}.log"

    def node_pid(self, node: int) -> Path:
        return self.logs / f"node-{node}.pid"

    def server_log(self, name: str | int) -> Path:
        """Of a server of the reference."""
        return self.logs / f"reference-server-{name}.log"

    @property
    def slurm(self) -> Path:
        """Batch scripts and their output."""
        return self.path / "slurm"

    @property
    def slurm_jobs(self) -> Path:
        """{stage: Slurm's id}."""
        return self.path / "slurm.json"

    # ---------------------------------------------------------------------------------------------------------- markers

    def clear(self, *markers: str) -> None:
        for marker in markers:
            (self.path / marker).unlink(missing_ok=True)

    @property
    def is_done(self) -> bool:
        return (self.path / DONE).exists()

    def mark_done(self) -> None:
        (self.path / DONE).touch()

    def preempted_by(self) -> int | None:
        """The number of the signal that stopped the run in good order; None where it was not stopped so."""
        found = _read(self.path / PREEMPTED)
        return None if found is None else int(found["signal"])

    def mark_preempted(self, message: str, signal: int) -> None:
        write_atomic(self.path / PREEMPTED, json.dumps({"message": message, "signal": signal}) + "\n")

    def failure(self) -> Failure | None:
        """What failed; None where nothing has, or where the marker is being written at this moment."""
        found = _read(self.path / FAILED)
        return None if found is None else Failure(**found)

    def mark_failed(self, failure: Failure, first_only: bool = False) -> bool:
        """Whether the marker is this one: with `first_only` another rank's stays."""
        try:
            with (self.path / FAILED).open("x" if first_only else "w") as file:
                json.dump(vars(failure), file)
        except FileExistsError:
            return False
        return True

    def state(self) -> str:
        """How the run stands, for a person."""
        if self.is_done:
            return f"done; the model is in {self.model}"
        for marker, means in ((FAILED, "failed"), (PREEMPTED, "stopped early")):
            if (found := _read(self.path / marker)) is not None:
                return f"{means}: {found['message']}"
        return "under way, or ended without a word (then the same command goes on from the last checkpoint)"


def _read(marker: Path) -> dict[str, Any] | None:
    try:
        return json.loads(marker.read_text())
    except (OSError, ValueError):
        return None
