"""A command run to its end: seconds on the clock and on the processor, the most memory that its processes held."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.25


def whole_run(words: Sequence[str | Path], log: Path, **environment: str) -> dict[str, float]:
    """Measured figures of the command with all that it starts. Ends this program where the command fails."""
    before, began = os.times(), time.perf_counter()
    with log.open("wb") as out:
        running = subprocess.Popen([str(word) for word in words], stdout=out, stderr=subprocess.STDOUT,
                                   cwd=Path(__file__).parent.parent, env={**os.environ, **environment})
        peak, over = [0], threading.Event()
        watching = threading.Thread(target=_watch, args=(running.pid, peak, over))
        watching.start()
        code = running.wait()
    seconds, after = time.perf_counter() - began, os.times()
    over.set()
    watching.join()
    if code:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{log.read_text(errors='replace')[-4000:]}")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1),
            "kernel_seconds": round(after.children_system - before.children_system, 1),
            "peak_gib": round(peak[0] / 2**30, 2)}


def _watch(root: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(SECONDS_BETWEEN_LOOKS):
        peak[0] = max(peak[0], sum(_held(process) for process in _tree(root)))


def _tree(root: int) -> list[int]:
    """The process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue                                             # it has ended meanwhile
    found, new = {root}, {root}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def _held(process: int) -> int:
    """Bytes of a process, what it shares with others counted in parts (PSS)."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
