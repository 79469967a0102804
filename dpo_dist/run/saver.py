"""Writes checkpoints beside training: the training waits only for a copy in the CPU's memory.

Each rank writes its files in a thread, from the copies. Then the ranks tell each other, over connections of their own,
and rank 0 writes the marker, once all files are on disk. What goes wrong with a disk costs that checkpoint alone: the
ones before stay, training goes on, and a person is told.
"""
from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch

from dpo_dist.config.errors import UserError
from dpo_dist.run.checkpoint import STATE, Checkpointed, Keep, TrainState, remove_checkpoint, remove_leftovers
from dpo_dist.runtime.checksums import Checksums, checksum
from dpo_dist.runtime.files import sync_file, sync_folder, write_json
from dpo_dist.runtime.host_memory import available_bytes
from dpo_dist.runtime.preemption import Stopped
from dpo_dist.runtime.run_dir import COMPLETE, RunDir
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.runtime.world import World

GIB = 2**30
MEMORY_SHARE = 0.8                         # of what this machine's memory has left that copies may take
SECONDS_AFTER_AN_ERROR = 30.0
SMALL_FILES = 1 << 20                      # bytes of a checkpoint besides the tensors and the run's rows


@dataclass(frozen=True)
class Written:
    """How a save ended, the same on all ranks."""

    step: int
    bytes: float                           # of tensors, over all ranks
    seconds: float                         # that writing took this rank
    fault: str | None                      # why it was not written


class Saver:
    """All ranks call `save` and `wait` alike; the other methods concern this rank alone."""

    def __init__(self, run_dir: RunDir, keep: Keep, in_background: bool, world: World,
                 say: Callable[[str], None]):
        self._run_dir, self._keep, self._in_background = run_dir, keep, in_background
        self._world, self._say = world, say
        self._beside = world.beside()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Written] | None = None
        self._copies: dict[str, TensorFile] = {}             # of the last save
        self._told: dict[str, float] = {}

    def save(self, parts: Sequence[Checkpointed], state: TrainState) -> None:
        """Begins to write checkpoints/step-NNNNNN, unless it is there."""
        began = time.perf_counter()
        self.wait()
        folder = self._run_dir.checkpoint(state.step)
        files = {name: file for part in parts for name, file in part.files().items()}
        size = self._world.sum(torch.tensor(float(sum(file.size for file in files.values())))).item()
        if not self._world.on_main(lambda: self._begin(folder, state.step, size)):
            return
        beside = self._in_background and not self._world.max(not self._memory_for(files))
        if beside:
            self._copies = files = {name: file.copied(self._copies.get(name)) for name, file in files.items()}
        self._pending = self._thread.submit(self._write, folder, files, state, size, self._lengths_of_rows())
        if not beside:                                   # training waits, and changes nothing meanwhile
            self.wait()
        self._told["perf/save_stall_seconds"] = time.perf_counter() - began

    def wait(self) -> Written | None:
        """Returns once nothing is being written; how the save that this waited for ended."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        written = pending.result()
        if written.fault is None:
            self._told |= {"perf/save_seconds": written.seconds, "perf/save_gib": written.bytes / GIB,
                           "perf/save_gib_per_second": written.bytes / GIB / written.seconds}
        else:
            self._tell_unsaved(written.step, written.fault)
        return written

    def told(self) -> dict[str, float]:
        """What there is to say of saves since the last call, for a row of metrics."""
        if self._pending is not None and self._pending.done():
            self.wait()
        told, self._told = self._told, {}
        return told

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        """What is being written is finished, whatever ends the run; not after a second Ctrl-C, and not where it takes
        long after an error: a rank may hang."""
        if error is None or isinstance(error, Stopped | UserError | FloatingPointError):     # on all ranks alike
            self.wait()
        elif isinstance(error, Exception):
            try:
                if self._pending is None or self._pending in wait([self._pending], SECONDS_AFTER_AN_ERROR).done:
                    self.wait()
                else:
                    logging.getLogger(__name__).warning("what was being written is no checkpoint: it took longer than "
                                                        "%g s after the error", SECONDS_AFTER_AN_ERROR)
            except Exception:
                logging.getLogger(__name__).exception("the last checkpoint was not finished")

    # ------------------------------------------------------------------------------------------------- before it begins

    def _begin(self, folder: Path, step: int, size: float) -> bool:
        """Whether the checkpoint is to be written; the folder is then there, and empty."""
        if (folder / COMPLETE).exists():
            self._remove_old()                           # another one may be the best by now
            return False
        shutil.rmtree(folder, ignore_errors=True)          # what a killed save left
        needed = int(size) + SMALL_FILES + sum(self._lengths_of_rows().values())
        try:
            for old in self._keep.superfluous(self._run_dir, more=1):
                if self._free() >= needed:
                    break
                remove_checkpoint(old)
            if (free := self._free()) < needed:
                self._tell_unsaved(step, f"{folder.parent} has {free / GIB:.3g} GiB left, and {needed / GIB:.3g} are "
                                         "needed")
                return False
            folder.mkdir(parents=True)
        except OSError as error:
            self._tell_unsaved(step, _told(error, folder))
            return False
        return True

    def _free(self) -> int:
        return shutil.disk_usage(self._run_dir.path).free

    def _tell_unsaved(self, step: int, why: str) -> None:
        newest = self._run_dir.newest_checkpoint()
        last = f"{newest.name} stays the last checkpoint" if newest else "there is no checkpoint yet"
        self._say(f"step {step} is not saved: {why}; training goes on, and {last}")

    def _memory_for(self, files: Mapping[str, TensorFile]) -> bool:
        """Whether this machine's memory holds a copy of what its ranks write, besides the copies that it has."""
        new = sum(file.copy_size for file in files.values()) - sum(file.copy_size for file in self._copies.values())
        return self._world.local_size * new <= MEMORY_SHARE * available_bytes()

    def _lengths_of_rows(self) -> dict[Path, int]:
        """{file of rows: its bytes now}: later rows are of later steps."""
        rows = self._run_dir.metrics, self._run_dir.samples, self._run_dir.guard
        return {path: path.stat().st_size for path in rows if path.exists()}

    # ---------------------------------------------------------------------------------------------------- in the thread

    def _write(self, folder: Path, files: Mapping[str, TensorFile], state: TrainState, size: float,
               rows: Mapping[Path, int]) -> Written:
        began, fault = time.perf_counter(), None
        written: Checksums = {}
        try:
            written = {name: file.write(folder / name) for name, file in files.items()}
        except OSError as error:
            fault = _told(error, folder)
        everyones = self._beside.gather((written, fault))
        fault = next((fault for _, fault in everyones if fault), None)
        if self._world.is_main:
            checksums = {name: one for some, _ in everyones for name, one in some.items()}
            fault = fault or self._complete(folder, checksums, state, rows)
            if fault:
                shutil.rmtree(folder, ignore_errors=True)
        fault = self._beside.gather(fault)[0]
        return Written(state.step, size, time.perf_counter() - began, fault)

    def _complete(self, folder: Path, checksums: Checksums, state: TrainState, rows: Mapping[Path, int]) -> str | None:
        """Adds the small files and the marker, and removes old checkpoints; what went wrong, if anything did."""
        try:
            for path, length in rows.items():
                _copy_beginning(path, folder / path.name, length)
            (folder / STATE).write_text(json.dumps(asdict(state)))
            for name in (STATE, *(path.name for path in rows)):
                with (folder / name).open("rb") as file:
                    sync_file(file)
                checksums[name] = checksum(folder / name)
            sync_folder(folder)                          # all names are on disk before the marker is
            write_json(folder / COMPLETE, checksums)
        except OSError as error:
            return _told(error, folder)
        self._remove_old()
        return None

    def _remove_old(self) -> None:
        for old in self._keep.superfluous(self._run_dir):
            remove_checkpoint(old)
        remove_leftovers(self._run_dir)


def _copy_beginning(source: Path, target: Path, length: int) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        while length > 0 and (block := old.read(min(length, 1 << 20))):
            new.write(block)
            length -= len(block)


def _told(error: OSError, folder: Path) -> str:
    """What a person is told of a disk's fault."""
    try:
        left = f" ({shutil.disk_usage(folder.parent).free / GIB:.3g} GiB are left there)"
    except OSError:
        left = ""
    return f"{error.strerror or error} in {folder.parent}{left}"
