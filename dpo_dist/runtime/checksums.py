"""What tells a damaged file from a whole one: its size and its XXH3-128 digest, written when the file was.

XXH3 finds what disks, networks and cut-off writes do to a file, at the speed of memory. It is no protection against a
person who changes a file on purpose: for that, sha256 stands in run.json (`dpo-dist verify`). No torch here.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import parsed

CHECKSUMS = "CHECKSUMS.json"           # in a folder of files that are read back: {file: its checksum}
THREADS = 8                            # files that are read at the same time: xxhash and read() let other threads run
BLOCK = 4 << 20

Checksum = dict[str, Any]              # {"bytes": size, "xxh3": hex digest}
Checksums = dict[str, Checksum]        # {path within a folder: checksum}


def checksum(file: Path) -> Checksum:
    """Of the file as it is now."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return as_checksum(size, digest.hexdigest())


def as_checksum(size: int, xxh3: str) -> Checksum:
    """Of a file of so many bytes, whose XXH3-128 digest is known."""
    return {"bytes": size, "xxh3": xxh3}


def checksums(folder: Path, files: Iterable[str] | None = None) -> Checksums:
    """Of these files of the folder, or of all that lie in it and below."""
    names = sorted(_files_below(folder) if files is None else files)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(folder / name), names), strict=True))


def write_checksums(folder: Path) -> None:
    """Writes CHECKSUMS.json, of all files that lie in the folder and below."""
    write_json(folder / CHECKSUMS, checksums(folder, (name for name in _files_below(folder) if name != CHECKSUMS)))


def damage(folder: Path, marker: str = CHECKSUMS, part: int = 0, parts: int = 1,
           files: Callable[[str], bool] = lambda name: True, of: Callable[[Path], Checksum] = checksum) -> list[str]:
    """What is wrong with a folder whose file `marker` holds the checksums of the others, a phrase for each file that is
    not as it was written; empty for a whole one. Further files are of no interest. part: of `parts` processes that
    share the reading, this one. files: whether a file of this name is looked at. of: what knows a file's checksum."""
    try:
        expected = _read(folder / marker)
    except (OSError, ValueError) as error:
        return [f"{marker} cannot be read ({error})"]
    mine = [name for name in expected if files(name)][part::parts]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _damage(folder / name, name, expected[name], of), mine)
        return [fault for fault in found if fault]


def _read(marker: Path) -> Checksums:
    """OSError or ValueError where it is not what write_checksums writes."""
    content = parsed(marker)
    if not content:
        raise ValueError("it names no file")
    for value in content.values():
        if not (isinstance(value, dict) and value.keys() == {"bytes", "xxh3"} and isinstance(value["bytes"], int)):
            raise ValueError("a file's checksum is not whole")
    return content


def _damage(file: Path, name: str, expected: Checksum, of: Callable[[Path], Checksum]) -> str:
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes, not {expected['bytes']:,}"
        return "" if of(file) == expected else f"{name} is not as it was written (its checksum differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"


def _files_below(folder: Path) -> list[str]:
    return [str((Path(parent) / name).relative_to(folder)) for parent, _, names in os.walk(folder) for name in names]
