"""Checkpoints on disk: what one says of a run, which are whole, which stay. saver.py writes them.

    checkpoints/step-NNNNNN/
        weights-RANK.safetensors, optim_states-RANK.safetensors      each rank's part (policy/trained_state.py)
        reference-RANK.safetensors                                   of a reference that moves
        visits-RANK.safetensors                                      what each pair's rewards were (dynamics/record.py)
        metrics.jsonl, samples.jsonl, guard.jsonl                    the run's, as they were
        state.json                                                   where the run was
        COMPLETE                                                     written last: the checksums of all the others
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.best import best_evaluation
from dpo_dist.runtime.checksums import damage
from dpo_dist.runtime.run_dir import COMPLETE, RunDir, by_step
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World

DAMAGED = "DAMAGED"                        # what COMPLETE is called in a folder that is not as it was written
STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run is. The order of pairs, the learning rate and the packs follow from the step."""

    step: int                    # optimizer steps done
    zero_stage: int | None       # under which the policy was
    ranks: int
    sums: list[float]            # of metrics.MetricSums since the last logged step, over all ranks
    identity: str                # RunConfig.identity: which run this is
    before: dict[str, float]     # held-out means before training
    saved_at: float              # seconds since the epoch


class Checkpointed(Protocol):
    """A part of a run that goes on from where it was: the policy, and a reference that moves."""

    def files(self) -> dict[str, TensorFile]: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest few, the best by a held-out metric, and one every so many hours."""

    newest: int
    best_by: str | None = None
    every_hours: float | None = None

    def superfluous(self, run_dir: RunDir, more: int = 0) -> list[Path]:
        """Those that need not stay, oldest first, once `more` further ones are written. The newest is never among
        them."""
        whole = run_dir.checkpoints()
        newest = whole[-max(1, self.newest - more):]
        best = best_evaluation(run_dir, self.best_by) if self.best_by else None
        stay = {*newest, *self._hourly(whole), *([run_dir.checkpoint(best["step"])] if best else [])}
        return [folder for folder in whole if folder not in stay]

    def _hourly(self, whole: list[Path]) -> list[Path]:
        """The first of each stretch of so many hours. A clock that was set back begins a new stretch."""
        if self.every_hours is None:
            return []
        kept, since = [], float("-inf")
        for folder in whole:
            try:
                saved_at = read_state(folder).saved_at
            except (OSError, ValueError, TypeError):     # damaged: whoever takes it finds out
                continue
            if not 0 <= saved_at - since < 3600 * self.every_hours:
                kept.append(folder)
                since = saved_at
        return kept


def remove_checkpoint(folder: Path) -> None:
    """Removes it; at no moment it looks whole and is not."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(run_dir: RunDir) -> None:
    """Removes folders older than the newest whole checkpoint that are not whole: of saves that were cut off, and
    damaged ones."""
    whole, folders = run_dir.checkpoints(), list(by_step((run_dir.path / "checkpoints").glob("*")).values())
    for folder in folders[:folders.index(whole[-1])] if whole else []:
        if folder not in whole:
            shutil.rmtree(folder, ignore_errors=True)


def read_state(folder: Path) -> TrainState:
    """Where the run was when it wrote this checkpoint, which is whole."""
    return TrainState(**json.loads((folder / STATE).read_text()))


def resume_point(run_dir: RunDir, world: World, terminal: Terminal) -> tuple[Path, TrainState] | None:
    """The newest checkpoint that is as it was written, and where it stands; None where the run has none. A damaged one
    is set aside, and a person is told. UserError where all are damaged. All ranks call it, and share the reading."""
    for folder in world.on_main(lambda: run_dir.checkpoints()[::-1]):
        faults = checkpoint_damage(folder, world)
        if not faults:
            return folder, world.on_main(partial(read_state, folder))
        world.on_main(partial(_rename, folder, COMPLETE, DAMAGED))
        terminal.say(f"{folder.name} is damaged: {faults[0]}; the checkpoint before is taken")
    return _whole_after_all(run_dir, world, terminal)


def _whole_after_all(run_dir: RunDir, world: World, terminal: Terminal) -> tuple[Path, TrainState] | None:
    """Where no other is left, those that were set aside are looked at again: a disk may only have failed to read
    them."""
    checkpoints, faults = run_dir.path / "checkpoints", list[str]()
    set_aside = world.on_main(lambda: by_step(path.parent for path in checkpoints.glob(f"*/{DAMAGED}")))
    for folder in reversed(set_aside.values()):
        if not (found := checkpoint_damage(folder, world, DAMAGED)):
            world.on_main(partial(_rename, folder, DAMAGED, COMPLETE))
            terminal.say(f"{folder.name} can be read again, and is whole")
            return folder, world.on_main(partial(read_state, folder))
        faults.append(f"{folder.name} is damaged: {found[0]}")
    if faults:
        raise UserError(f"run.dir={run_dir.path} has no checkpoint that is whole ({'; '.join(faults)}); mend the disk "
                        f"where it is that, or, to train from the beginning, move {checkpoints} away")
    return None


def checkpoint_damage(folder: Path, world: World, marker: str = COMPLETE) -> list[str]:
    """What is wrong with a checkpoint that is marked as whole, a phrase for each damaged file. All ranks call it, and
    share the reading."""
    parts = world.together(lambda: damage(folder, marker, world.rank, world.size))
    return [fault for part in parts for fault in part]


def load_checkpoint(parts: Sequence[Checkpointed], folder: Path, world: World) -> None:
    """Loads a checkpoint that is not the one that `resume_point` found. UserError where it is damaged. All ranks call
    it."""
    if faults := checkpoint_damage(folder, world):
        raise UserError(f"{folder} is damaged ({faults[0]}), and its weights are what is to be exported; to do without "
                        "it, remove it, and to train again, move all checkpoints away")
    for part in parts:
        part.load(folder)


def _rename(folder: Path, marker: str, to: str) -> None:
    """To DAMAGED: the folder is no checkpoint any more, and stays until there is a newer one."""
    (folder / marker).rename(folder / to)


def check_fits(resumed: tuple[Path, TrainState] | None, config: RunConfig, ranks: int) -> None:
    """UserError where this run cannot go on from this checkpoint with so many ranks under its stage."""
    if resumed is None or config.optim.may_reshard:
        return
    folder, state = resumed
    layout = config.zero.chosen_stage, ranks
    if (state.zero_stage, state.ranks) != layout:
        raise UserError(f"{folder.name} was written by {state.ranks} ranks with zero.stage={state.zero_stage} and "
                        f"optim.name={config.optim.name}, whose state cannot be cut anew for {ranks} with "
                        f"zero.stage={layout[0]}; start as many with the same stage, or a new run from the exported "
                        "model")
