"""Damaged files: cut, flipped, gone, garbage, exchanged. Of a run that was killed in the middle, or of a finished
one."""
from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from .bases import FINISHED, MIDWAY
from .trial import Trial
from .verdict import SILENT, Verdict, given_once

# groups that are drawn alike: their files are many or few
GROUPS = {"checkpoints": "run/checkpoints/**/*", "model": "run/model/*", "run": "run/*", "run's folders": "run/*/*",
          "tokens": "tokens/**/*", "reference": "reference/**/*", "inputs": "m/*"}
TOO_LARGE_TO_MATTER = ("run/report.html", "run/report.json")         # made anew at each end, read by nobody
# what is read back by each start, or is what the run was for: a damaged one must not stay without a word
KEPT_IN_USE = ("tokens/*/*/*.npy", "run/model/*.json", "run/model/*.safetensors")


def files_of(work: Path, pattern: str) -> list[Path]:
    return sorted(path for path in work.glob(pattern) if path.is_file()
                  and str(path.relative_to(work)) not in TOO_LARGE_TO_MATTER)


def damaged(change: Callable[[Path, random.Random], str]) -> Callable[[Trial], Verdict]:
    """A fault: one file is changed so, and the same command given again."""
    def strike(trial: Trial) -> Verdict:
        state = trial.begin(MIDWAY, MIDWAY, FINISHED)
        groups = [files for pattern in GROUPS.values() if (files := files_of(trial.work, pattern))]
        file = trial.random.choice(trial.random.choice(groups))
        name = file.relative_to(trial.work)
        trial.tell(f"{change(file, trial.random)} {name}")
        after = file.read_bytes() if file.exists() else None
        original = trial.base.folder / state / name
        trial.undo.append(lambda: _restore(original, file))
        return _kept(trial, file, after, original, given_once(trial))
    return strike


def _restore(original: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(original, file)


def _kept(trial: Trial, file: Path, after: bytes | None, original: Path, verdict: Verdict) -> Verdict:
    """Silent where a damaged file of those that are in use stays as it is, though the results are right."""
    if not verdict.fine or len(trial.attempts) > 1 or after == original.read_bytes():
        return verdict
    in_use = any(file in trial.work.glob(pattern) for pattern in KEPT_IN_USE)
    now = file.read_bytes() if file.exists() else None
    return Verdict(SILENT, f"{file.name} is kept in use as it is") if in_use and now == after else verdict


def truncate(file: Path, draw: random.Random) -> str:
    size = file.stat().st_size
    length = draw.choice((0, size // 2, max(0, size - 1), draw.randint(0, max(0, size - 1))))
    with file.open("r+b") as stream:
        stream.truncate(length)
    return f"cut to {length} of {size} bytes:"


def flip(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if not content:
        file.write_bytes(b"\1")
        return "one byte in the empty"
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} flipped in"


def remove(file: Path, draw: random.Random) -> str:
    file.unlink()
    return "removed"


def garbage(file: Path, draw: random.Random) -> str:
    size = file.stat().st_size
    choices = {"random bytes": draw.randbytes(max(size, 1)), "zeros": bytes(size), "words": b"garbage\n",
               "an empty object": b"{}", "an empty list": b"[]", "null": b"null", "a number": b"7",
               "invalid utf-8": b"\xff\xfe\xfa", "a deep list": b"[" * 100_000,
               "an object of lists": b'{"step": [], "config": [], "passport": [], "identity_of": [], "state": []}'}
    name = draw.choice(list(choices))
    file.write_bytes(choices[name])
    return f"{name} in place of"


def exchange(file: Path, draw: random.Random) -> str:
    """With another file of the same ending nearby: a copy that went wrong."""
    others = [other for other in sorted(file.parent.parent.rglob(f"*{file.suffix}")) if other.is_file()
              and other.name != file.name and other.stat().st_size < 1_000_000]
    if not others:
        return truncate(file, draw)
    other = draw.choice(others)
    file.write_bytes(other.read_bytes())
    return f"{other.name} in place of"
