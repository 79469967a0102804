"""Whether an exported model's files are as they were exported, before anything is read from them."""
from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.models.resolve import READ
from dpo_dist.runtime.checksums import CHECKSUMS, Checksum, checksum, damage
from dpo_dist.runtime.remember import remembered


def check_whole(folder: Path, key: str, memory: Path | None = None, wanted: Sequence[str] = READ) -> None:
    """UserError naming `key` where a file of an exported folder that these patterns name is not as it was exported.
    Folders that others wrote have no checksums. A file that is as it was when the folder `memory` learned of it is not
    read again."""
    if not (folder / CHECKSUMS).is_file():
        return
    wrong = damage(folder, files=lambda name: any(fnmatch(name, pattern) for pattern in wanted),
                   of=partial(_checksum, memory))
    if wrong:
        raise UserError(f"{key}={folder} is not as it was exported: {'; '.join(wrong[:3])}. Export it again (the same "
                        "dpo-dist run or dpo-dist export as before), copy it again, or remove its "
                        f"{CHECKSUMS} where it was changed on purpose")


def _checksum(memory: Path | None, file: Path) -> Checksum:
    return dict(remembered(memory, "xxh3", file, checksum))
