"""What rank 0 leaves on disk the others read: a run on several nodes needs folders that all of them mount."""
from __future__ import annotations

import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig

if TYPE_CHECKING:                          # `dpo-dist doctor` asks for the folders, and does without torch
    from dpo_dist.runtime.world import World


def shared_folders(config: RunConfig) -> dict[str, Path]:
    """{key: folder} of the folders that one rank writes and the others read."""
    folders = {"run.dir": Path(config.run_dir), "data.cache_dir": Path(config.data.cache_dir)}
    if config.loss.needs_reference and config.reference.mode != "live":
        folders["reference.cache_dir"] = Path(config.reference.cache_dir)
    return folders


def check_shared(config: RunConfig, world: World) -> None:
    """UserError, on every rank, where a rank finds another folder than rank 0 under a name that all of them must share.

    Checked before any work: otherwise a checkpoint without a node's shards would be noticed only when it is needed.
    """
    if world.size == 1:
        return
    folders = shared_folders(config)
    tokens = world.on_main(lambda: {key: _leave_token(folder) for key, folder in folders.items()})
    unseen = [(key, f"{folders[key].absolute()} on {socket.gethostname()}") for key, name in tokens.items()
              if name is not None and not (folders[key] / name).exists()]
    everywhere = [entry for rank in world.gather(unseen) for entry in rank]
    world.on_main(lambda: _remove(folders, tokens))
    if everywhere:
        key = everywhere[0][0]
        others = ", ".join(sorted({where for k, where in everywhere if k == key}))
        raise UserError(f"{key}={folders[key]} is not one folder for all ranks: what rank 0 wrote there is not to be "
                        f"seen in {others}; set {key} to the absolute path of a folder that every node mounts")


def _leave_token(folder: Path) -> str | None:
    """The name of a new empty file; None where nothing can be written, so that nothing will be left to read."""
    name = f".seen-by-all-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:                                      # the code that must write there reports it
        return None
    return name


def _remove(folders: dict[str, Path], tokens: dict[str, str | None]) -> None:
    for key, name in tokens.items():
        if name is not None:
            (folders[key] / name).unlink()
