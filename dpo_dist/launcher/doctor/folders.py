"""The folders that a run writes: can they be written and shared, does their clock agree, is there room?"""
from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.doctor.finding import Finding, together
from dpo_dist.launcher.doctor.network import node_count
from dpo_dist.runtime.shared_folders import shared_folders
from dpo_dist.sizing.estimate import GIB
from dpo_dist.sizing.shape import stored_elements

LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay"}
SKEW_SECONDS = 5                   # with more, files of different nodes cannot be ordered
LEAST_FREE_GIB = 1
# a parameter in a checkpoint: its fp32 value and Adam's two moments (measured: 12.03)
STATE_BYTES = 12
# ZeRO 0 to 2 keep the module's own weights beside them; the exported model has them too
MODULE_BYTES = 4


def shared_folder(config: RunConfig) -> Finding:
    return together([_usable(key, folder, node_count(config)) for key, folder in shared_folders(config).items()])


def clock(config: RunConfig) -> Finding | None:
    """This machine's clock against the file system's, which other nodes see too; None where nothing can be written."""
    folder = _nearest(Path(config.run_dir))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"now")
            file.flush()
            skew = time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None                # shared_folder reports it
    if abs(skew) > SKEW_SECONDS:
        return Finding(f"this machine's clock is {skew:+.0f} s off the file system's ({folder})",
                       "synchronise both with NTP (chronyd)")
    return Finding(f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, within {SKEW_SECONDS} s of the file system's")


def disk(config: RunConfig) -> Finding:
    folder = _nearest(Path(config.run_dir))
    needed, why = needed_bytes(config)
    free = shutil.disk_usage(folder).free
    if free < needed:
        return Finding(f"{free / GIB:.1f} GiB free in {folder}, needs {needed / GIB:.1f} GiB {why}",
                       "make room, set run.dir to a larger disk, or lower train.keep_checkpoints")
    return Finding(f"{free / GIB:.1f} GiB free in {folder}, {why}")


def _usable(key: str, folder: Path, nodes: int) -> Finding:
    """What the project does in its folders: writes a file under another name and renames it, and locks."""
    remedy = f"set {key} to a folder that can be written"
    there = _nearest(folder)
    kind = _file_system(there)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".doctor-") as scratch:
            _rename(Path(scratch))
            locked = _locks(Path(scratch))
    except OSError as error:
        return Finding(f"{key}={folder} cannot be written: {error.strerror} ({there})", remedy)
    if not locked:
        return Finding(f"{key}={folder} is on {kind}, where flock does not work",
                       f"{remedy} and locked; Lustre needs the mount option flock")
    if nodes > 1 and kind in LOCAL_FILE_SYSTEMS:
        return Finding(f"{nodes} nodes, but {key}={folder} is on {kind}, a disk of this machine alone",
                       f"set {key} to a folder that every node mounts")
    return Finding(f"{key} on {kind}")


def _rename(scratch: Path) -> None:
    (scratch / "new").write_text("new")
    (scratch / "old").write_text("old")
    (scratch / "new").replace(scratch / "old")
    assert (scratch / "old").read_text() == "new"


def _locks(scratch: Path) -> bool:
    """True where a second lock is refused while the first is held."""
    with (scratch / "lock").open("w") as first, (scratch / "lock").open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)           # any other: flock does not work here at all
    return False


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: the doctor makes no folder of a run."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _file_system(folder: Path) -> str:
    """The kind of the mount that holds the folder, as Linux names it: ext4, nfs4, lustre."""
    best = ("", "an unknown file system")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, after.split()[0])
    return best[1]


def needed_bytes(config: RunConfig) -> tuple[int, str]:
    """(bytes that a run will write, for what): its checkpoints and model, or a minimum if the size is not known."""
    parameters = stored_elements(Path(config.model.path))
    if not parameters or config.trains_adapter:
        return LEAST_FREE_GIB * GIB, "for a run whose size is not known"
    checkpoints = config.train.keep_checkpoints + 1      # the newest is written before the oldest goes
    needed = parameters * (STATE_BYTES * checkpoints + MODULE_BYTES)
    why = f"for {checkpoints} checkpoints and the model of {parameters / 1e9:.2f} B parameters"
    return max(LEAST_FREE_GIB * GIB, needed), why
