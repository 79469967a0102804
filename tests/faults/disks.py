"""Disks that are full, without inodes, read-only, slow, or failing."""
from __future__ import annotations

import shutil
import time
from pathlib import Path

from . import commands
from .bases import CACHED, FINISHED, FRESH, MIDWAY
from .moments import any_moment
from .rights import mount, unmount
from .trial import Trial
from .verdict import LOST, STOPPED, Verdict, after_a_stop, ended, given_once, hung

PAGE = 4096
FOLDERS = ("run", "run", "tokens", "reference")


def full(trial: Trial) -> Verdict:
    """A folder lies on a small disk, which is full at some point of the run; later there is room."""
    folder, state = _folder(trial), trial.base.folder
    used, needed = pages(folder), pages(state / FINISHED / folder.name)
    size = used + trial.random.randint(1, max(2, round(1.3 * needed) - used))
    trial.tell(f"{folder.name} on a disk of {size * PAGE // 1024} KiB, {used * PAGE // 1024} of them used")
    _on_a_disk(folder, f"size={size * PAGE},nr_inodes=100000", trial)
    trial.undo.append(lambda: mount("-o", "remount,size=256m", folder))
    return _named(folder, given_once(trial))


def no_inodes(trial: Trial) -> Verdict:
    """As `full`, where there is room but for no further file."""
    folder, state = _folder(trial), trial.base.folder
    used, needed = files(folder), files(state / FINISHED / folder.name)
    most = used + trial.random.randint(0, max(2, round(1.3 * needed) - used))
    trial.tell(f"{folder.name} on a disk of {most} inodes, {used} of them used")
    _on_a_disk(folder, f"size=256m,nr_inodes={most + 1}", trial)
    trial.undo.append(lambda: mount("-o", "remount,nr_inodes=100000", folder))
    return _named(folder, given_once(trial))


def read_only(trial: Trial) -> Verdict:
    """A folder that cannot be written, from the start or from some moment on."""
    trial.begin(FRESH, CACHED, MIDWAY)
    name = trial.random.choice(("run", "run/checkpoints", "tokens", "reference"))
    folder = trial.work / name
    if trial.random.random() < 0.5:
        trial.tell(f"{name} is read-only")
        folder.mkdir(parents=True, exist_ok=True)
        _cannot_be_written(folder, trial)
        return given_once(trial)
    moment = any_moment(trial.random, trial.base.seconds)
    trial.tell(f"{name} becomes read-only {moment}")
    began, process = time.monotonic(), trial.start()
    if moment.wait(trial.work, process) and folder.is_dir():
        _cannot_be_written(folder, trial)
    attempt = trial.note(commands.finish(process, trial.work, began))
    if attempt.hung:
        return hung(trial)
    if attempt.code:
        return after_a_stop(trial)
    trial.mend()
    return ended(trial)


def slow(trial: Trial) -> Verdict:
    trial.begin(FRESH, MIDWAY)
    milliseconds = trial.random.choice((5, 20, 60))
    trial.tell(f"each sync takes {milliseconds} ms more")
    trial.environment["DPO_FAULTS_SLOW"] = str(milliseconds)
    trial.undo.append(lambda: trial.environment.clear())
    return given_once(trial)


def failing(trial: Trial) -> Verdict:
    """Reads, writes or syncs of files below a folder fail with an input/output error, a few or all from some on."""
    trial.begin(FRESH, CACHED, MIDWAY)
    folder = trial.random.choice(("run/checkpoints", "run", "tokens", "reference", "m", "rows.jsonl"))
    first, count = trial.random.choice((1, 2, 5, 20, 50, 150)), trial.random.choice((1, 3, 100_000))
    trial.tell(f"{folder}: input/output errors from number {first} on, {count} of them")
    trial.environment["DPO_FAULTS_EIO"] = f"{first}:{count}:{trial.work / folder}"
    trial.undo.append(lambda: trial.environment.clear())
    return given_once(trial)


def _folder(trial: Trial) -> Path:
    """One that a run fills, in some state."""
    name = trial.random.choice(FOLDERS)
    trial.begin(*((FRESH, CACHED, MIDWAY) if name == "run" else (FRESH,)))
    return trial.work / name


def _named(folder: Path, verdict: Verdict) -> Verdict:
    """Lost where a stop tells of another disk than the full one."""
    named = verdict.name != STOPPED or folder.name in verdict.detail
    return verdict if named else Verdict(LOST, f"names another folder than {folder.name}: {verdict.detail}")


def _on_a_disk(folder: Path, options: str, trial: Trial) -> None:
    """Puts the folder, with what lies there, on a disk of its own in memory."""
    aside = folder.with_name(f"{folder.name}-before")
    if folder.exists():
        folder.rename(aside)
    folder.mkdir()
    mount("-t", "tmpfs", "-o", options, "faults", folder)
    trial.afterwards.append(lambda: unmount(folder))
    if aside.exists():
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        shutil.rmtree(aside)


def _cannot_be_written(folder: Path, trial: Trial) -> None:
    mount("--bind", folder, folder)
    trial.undo.append(lambda: unmount(folder))
    mount("-o", "remount,bind,ro", folder)


def pages(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def files(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))
