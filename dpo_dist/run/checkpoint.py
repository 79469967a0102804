"""Checkpoints: whole only with their COMPLETE marker, which is written last; the newest few are kept."""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.best import best_evaluation
from dpo_dist.runtime.files import sync_folder, sync_tree, write_atomic
from dpo_dist.runtime.run_dir import COMPLETE, RunDir
from dpo_dist.runtime.world import World


@dataclass(frozen=True)
class TrainState:
    """Where a run is. The order of pairs, the learning rate and the packs follow from the step."""

    step: int                    # optimizer steps done
    zero_stage: int | None       # the layout of the policy's own files
    ranks: int
    sums: list[float]            # of metrics.MetricSums since the last logged step, over all ranks
    # held-out means before training; None: not known (a checkpoint of an earlier version)
    before: dict[str, float] | None = None


class Checkpointed(Protocol):
    """A part of a run that goes on from where it was: the policy, and a reference that moves."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest few, and the best by a held-out metric."""

    newest: int
    best_by: str | None = None


def save_checkpoint(run_dir: RunDir, parts: Sequence[Checkpointed], state: TrainState, keep: Keep,
                    world: World) -> Path:
    """Writes checkpoints/step-NNNNNN, unless it is there, and removes those that `keep` does not name. All ranks call
    it."""
    folder = run_dir.checkpoint(state.step)
    if world.on_main(lambda: _is_there(folder)):
        world.on_main(lambda: _remove_old(run_dir, keep))
        return folder
    for part in parts:
        part.save(folder)
    world.barrier()                                        # every rank's part is written
    if world.local_rank == 0:
        sync_tree(folder)                                  # and on disk before the marker is
    world.barrier()
    world.on_main(lambda: _complete(run_dir, folder, state, keep))
    return folder


def latest_checkpoint(run_dir: RunDir) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max(run_dir.checkpoints(), default=None)


def read_state(folder: Path) -> TrainState:
    """Where the run was when it wrote this checkpoint."""
    return TrainState(**json.loads((folder / "state.json").read_text()))


def resume_point(run_dir: RunDir, config: RunConfig, ranks: int) -> tuple[Path, TrainState] | None:
    """The newest whole checkpoint and where it stands, or None. UserError where this run cannot go on from it."""
    folder = latest_checkpoint(run_dir)
    if folder is None:
        return None
    state, zero_stage = read_state(folder), config.zero.chosen_stage
    if state.zero_stage != zero_stage:
        raise UserError(f"{folder.name} was written with zero.stage={state.zero_stage}, not {zero_stage}; go on with "
                        "the same zero.stage, or start a new run from the exported model")
    if zero_stage == 0 and state.ranks != ranks:
        raise UserError(f"{folder.name} was written by {state.ranks} ranks under ZeRO-0, which cannot go on with "
                        f"{ranks}; start as many, or train with zero=zero1 or higher")
    if state.ranks != ranks and not config.optim.may_reshard:
        raise UserError(f"{folder.name} was written by {state.ranks} ranks with optim.name={config.optim.name}, whose "
                        f"state cannot be cut anew for {ranks}; start as many, or a new run from the exported model")
    return folder, state


def _is_there(folder: Path) -> bool:
    """Whether this step is saved; where it is not, the folder is empty afterwards."""
    if (folder / COMPLETE).exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)              # what a killed save left
    folder.mkdir(parents=True)
    return False


def _complete(run_dir: RunDir, folder: Path, state: TrainState, keep: Keep) -> None:
    write_atomic(folder / "state.json", json.dumps(asdict(state)))
    (folder / COMPLETE).touch()
    sync_folder(folder)
    _remove_old(run_dir, keep)


def _remove_old(run_dir: RunDir, keep: Keep) -> None:
    best = best_evaluation(run_dir, keep.best_by) if keep.best_by else None
    for old in run_dir.checkpoints()[:-keep.newest]:
        if best is None or old != run_dir.checkpoint(best["step"]):
            (old / COMPLETE).unlink()                      # first invalid, then removed
            shutil.rmtree(old)
