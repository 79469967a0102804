"""Checkpoints: whole only with their COMPLETE marker, which is written last; the newest few are kept."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.world import World

COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class TrainState:
    """Where a run is. The order of pairs, the learning rate and the packs are functions of the step, so nothing else is needed."""

    step: int                    # optimizer steps done
    zero_stage: int | None       # the layout of the policy's own files
    ranks: int
    sums: list[float]            # of metrics.MetricSums since the last logged step, over all ranks


class Kept(Protocol):
    """A part of a run that goes on from where it was: the policy, and a reference that moves."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save_checkpoint(run_dir: Path, parts: Sequence[Kept], state: TrainState, keep: int, world: World) -> Path:
    """Writes checkpoints/step-NNNNNN, unless it is there, and removes the oldest beyond `keep`. All ranks call it."""
    folder = run_dir / "checkpoints" / f"step-{state.step:06d}"
    if world.on_main(lambda: _is_there(folder)):
        return folder
    for part in parts:
        part.save(folder)
    if world.local_rank == 0:
        os.sync()                                          # this node's parts reach the disk before the marker does
    world.barrier()
    world.on_main(lambda: _complete(folder, state, keep))
    return folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    whole = sorted(marker.parent for marker in run_dir.glob(f"checkpoints/step-*/{COMPLETE}"))
    return whole[-1] if whole else None


def read_state(folder: Path) -> TrainState:
    """Where the run was when it wrote this checkpoint."""
    return TrainState(**json.loads((folder / "state.json").read_text()))


def resume_point(run_dir: Path, zero_stage: int | None, ranks: int) -> tuple[Path, TrainState] | None:
    """The newest whole checkpoint and where it stands, or None. UserError where this run cannot go on from it."""
    folder = latest_checkpoint(run_dir)
    if folder is None:
        return None
    state = read_state(folder)
    if state.zero_stage != zero_stage:
        raise UserError(f"{folder.name} was written with zero.stage={state.zero_stage}, not {zero_stage}; go on with the same zero.stage, "
                        "or start a new run from the exported model")
    if zero_stage == 0 and state.ranks != ranks:
        raise UserError(f"{folder.name} was written by {state.ranks} ranks under ZeRO-0, which cannot go on with {ranks}; start as many, "
                        "or train with zero=zero1 or higher")
    return folder, state


def _is_there(folder: Path) -> bool:
    """Whether this step is saved; where it is not, the folder is empty afterwards."""
    if (folder / COMPLETE).exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)              # what a killed save left
    folder.mkdir(parents=True)
    return False


def _complete(folder: Path, state: TrainState, keep: int) -> None:
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    os.sync()
    (folder / COMPLETE).touch()
    for old in sorted(folder.parent.glob(f"step-*/{COMPLETE}"))[:-keep]:
        old.unlink()                                       # first no longer whole, then gone
        shutil.rmtree(old.parent)
