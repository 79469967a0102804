"""RunDir: every name in a run's folder, and what its markers say. No torch here: the launcher uses it too."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.checksums import CHECKSUMS
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import SEAL, found_object, is_whole, needed_object
from dpo_dist.runtime.json_lines import json_lines

DONE, PREEMPTED, FAILED = "DONE", "PREEMPTED", "FAILED"
MODES = {"owner": 0o700, "group": 0o750, "all": 0o755}           # {run.readable_by: of the run's folder}
COMPLETE = "COMPLETE"                  # in a checkpoint's folder, written last
STEP = re.compile(r"step-(\d{6,})(\.parquet)?")          # a checkpoint's folder, an evaluation's file
WRITTEN_ANEW = "the command that trained the run writes it anew"


@dataclass(frozen=True)
class Failure:
    """What a FAILED marker says."""

    message: str
    exit_code: int = 1
    rank: int = 0
    node: int = 0
    lost_peer: bool = False              # another rank is gone, or does not answer: what it died of is not known here


def make_for(folder: Path, readable_by: str) -> None:
    """Makes the folder, and those above it. Who may look into it (run.readable_by) is decided here for all that will be
    in it; a folder that is there keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(MODES[readable_by])
    except FileExistsError:
        folder.mkdir(exist_ok=True)                    # raises where it is a file
    else:
        folder.chmod(MODES[readable_by])               # whatever the umask


def by_step(paths: Iterable[Path]) -> dict[int, Path]:
    """{step: its checkpoint's folder, or its evaluation's file}, in order. What a person put beside them is left
    out."""
    return dict(sorted((int(found[1]), path) for path in paths if (found := STEP.fullmatch(path.name))))


class RunDir:
    """A run's folder, which may not exist yet."""

    def __init__(self, folder: str | Path):
        self.path = path = Path(folder)
        self.run_json = path / "run.json"              # the resolved config and where the run's numbers come from
        self.provenance = path / "provenance"          # digests of rows, tensors, files: what `verify` compares
        self.metrics = path / "metrics.jsonl"          # one JSON object a logged step
        self.samples = path / "samples.jsonl"          # one object a prompt and evaluation, with eval.samples
        self.checksums = path / CHECKSUMS              # of metrics, samples and guard, once the run has ended
        self.visits = path / "visits"                  # what each pair's rewards were, each time it was trained on
        self.datamap_json = path / "datamap.json"      # what each pair taught
        self.suspects = path / "suspects.jsonl"        # every training pair, the likeliest to be mislabelled first
        self.next = path / "next"                      # the next round's rows
        self.generations_json = path / "generations.json"      # figures of the samples, before training and now
        self.guard = path / "guard.jsonl"              # what the guards found
        self.judge_json = path / "judge.json"          # what eval.judge makes of the samples
        self.model = path / "model"                    # what from_pretrained loads
        self.adapter = path / "adapter"                # what peft and servers load; beside the model or in its place
        self.eval_json = path / "eval.json"
        self.evaluations = path / "evaluations"        # a file a held-out evaluation: what it measured of each pair
        self.evaluation_json = path / "evaluation.json"            # what they say
        self.command = path / "command.txt"            # what trains the same again
        self.report_html = path / "report.html"
        self.report_json = path / "report.json"        # the numbers behind the page
        self.harness = path / "harness"                # what lm-evaluation-harness wrote, ...
        self.harness_json = path / "harness.json"      # ... and its results
        self.parity_json = path / "parity.json"        # the audit of a served reference
        self.audit_json = path / "audit.json"          # what is wrong with the data
        self.data_summary = path / "data.txt"
        self.pushed_json = path / "pushed.json"        # where the model on the hub is
        self.wandb_id = path / "wandb_id"
        self.mlflow_id = path / "mlflow_id"
        self.mlflow = path / "mlruns"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.launcher_log = self.logs / "launcher.log"
        self.slurm = path / "slurm"                    # batch scripts and their output
        self.slurm_jobs = path / "slurm.json"          # {stage: Slurm's id}

    def make(self, readable_by: str = "owner") -> None:
        """Makes the folder, with that of its logs. UserError where that cannot be. readable_by: as run.readable_by."""
        try:
            make_for(self.path, readable_by)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be made: {error}; set run.dir to a folder that can be "
                            "written") from error

    def exports(self, merged: bool, adapter: bool) -> list[Path]:
        """The folders that a run leaves behind."""
        return [folder for folder, wanted in ((self.model, merged), (self.adapter, adapter)) if wanted]

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """The folders of whole checkpoints, oldest first."""
        return list(by_step(marker.parent for marker in self.path.glob(f"checkpoints/*/{COMPLETE}")).values())

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest whole one."""
        return next(reversed(self.checkpoints()), None)

    def not_finite(self, step: int) -> Path:
        """What reproduces a step whose loss or gradient was not finite."""
        return self.path / "not-finite" / f"step-{step:06d}"

    def evaluation(self, step: int) -> Path:
        return self.evaluations / f"step-{step:06d}.parquet"

    def hub_commits(self) -> dict[str, str]:
        """{hub name: commit} that the run began with; empty where it has none, or has not begun."""
        found = found_object(self.run_json) or {}
        passport = found.get("passport")
        kept = passport.get("hub") if isinstance(passport, dict) else None
        return {str(name): str(commit) for name, commit in kept.items()} if isinstance(kept, dict) else {}

    def holds(self, identity: dict[str, Any]) -> bool:
        """Whether the folder is of a run that trains just this (RunConfig.identity_dict)."""
        found = found_object(self.run_json)
        return found is not None and found.get("identity_of") == identity

    def written(self, verb: str, edited: bool = False) -> dict[str, Any]:
        """The content of run.json: config, passport and identity_of. UserError, for a command of this verb, where there
        is none, or none that can be read. edited: it may say something else than the run wrote."""
        if not self.run_json.is_file():
            raise UserError(f"{self.path} holds no run: there is no {self.run_json.name}; give the run.dir of one, as "
                            f"in: dpo-dist {verb} runs/my-run")
        found = needed_object(self.run_json, WRITTEN_ANEW)
        for part in ("config", "passport", "identity_of"):
            if not isinstance(found.get(part), dict):
                raise UserError(f"{self.run_json} is damaged: it has no {part}; {WRITTEN_ANEW}")
        if SEAL in found and not edited and not is_whole(found):
            raise UserError(f"{self.run_json} is damaged: it does not say what the run wrote; {WRITTEN_ANEW}")
        return found

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def node_log(self, node: int) -> Path:
        return self.logs / f"node-{node}.log"

    def node_pid(self, node: int) -> Path:
        return self.logs / f"node-{node}.pid"

    def server_log(self, name: str | int) -> Path:
        """Of a server of the reference."""
        return self.logs / f"reference-server-{name}.log"

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl of one split, oldest first: step, split and numbers. Lines that are not whole are
        left out."""
        return [row for row in json_lines(self.metrics, {"step": (int,), "split": (str,)})
                if row["split"] == split and all(_is_number(value) for key, value in row.items() if key != "split")]

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
        found = found_object(self.path / PREEMPTED) or {}
        return found["signal"] if isinstance(found.get("signal"), int) else None

    def mark_preempted(self, message: str, signal: int) -> None:
        write_json(self.path / PREEMPTED, {"message": message, "signal": signal})

    def failure(self) -> Failure | None:
        """What failed; None where nothing has, or where the marker is being written at this moment."""
        found = found_object(self.path / FAILED) or {}
        kinds = {"message": str, "exit_code": int, "rank": int, "node": int, "lost_peer": bool}
        fits = "message" in found and all(isinstance(value, kinds.get(key, ())) for key, value in found.items())
        return Failure(**found) if fits else None

    def mark_failed(self, failure: Failure, first_only: bool = False) -> bool:
        """Writes the marker, where the disk takes it; whether it is this failure's now. With `first_only` another
        rank's marker stays."""
        try:
            with (self.path / FAILED).open("x" if first_only else "w") as file:
                json.dump(vars(failure), file)
        except FileExistsError:
            return False
        except OSError:                                  # a full disk, which may be the very failure
            pass
        return True

    def state(self) -> str:
        """How the run stands, for a person."""
        if self.is_done:
            return f"done; the model is in {self.model if self.model.exists() else self.adapter}"
        for marker, means in ((FAILED, "failed"), (PREEMPTED, "stopped early")):
            if (self.path / marker).exists():
                return f"{means}: {(found_object(self.path / marker) or {}).get('message', 'why cannot be read')}"
        return "under way, or ended without a word (then the same command goes on from the last checkpoint)"


def _is_number(value: Any) -> bool:
    """As a row of metrics has it: what JSON has no number for is text."""
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")
