"""Files that are whole or absent: a kill or a power cut leaves what is written here, or what was there before."""
from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the file under a temporary name, syncs it to disk, and renames it. Several processes may do so at once."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """As write_atomic: the content as indented JSON."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def jsonable(value: Any) -> Any:
    """The value as it is; a number that JSON does not have as text: "nan", "inf" or "-inf"."""
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the path's place once the block ends, and is removed where it fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            sync_file(file)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256(file: Path) -> str:
    """Of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(file: IO[Any]) -> None:
    """Returns when the file's content is on disk: else a rename could survive a power cut that its content does not."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the folder's names are on disk. Does nothing on network file systems that cannot sync a folder."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        pass
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Returns when all files below the folder, and their names, are on disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                sync_file(file)
        sync_folder(Path(parent))
