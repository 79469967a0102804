"""<run.dir>/metrics.jsonl: one JSON object a row, always written; resumes, sweeps and people read it. Beside it
samples.jsonl. CHECKSUMS.json tells whether they, and guard.jsonl, are as the run left them when it ended."""
from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dpo_dist.run.tracking import MetricsRow, SampleRow
from dpo_dist.runtime.checksums import Checksum, checksum, checksums
from dpo_dist.runtime.files import jsonable, write_atomic, write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.json_lines import STEP, row_of
from dpo_dist.runtime.run_dir import RunDir

log = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line. The summary is not kept here: its numbers are rows already."""

    def __init__(self, run_dir: RunDir, resumed_step: int):
        self._run_dir, self._samples = run_dir, run_dir.samples
        run_dir.checksums.unlink(missing_ok=True)        # from here on they change
        for path in (run_dir.metrics, run_dir.samples):
            keep_rows_until(path, resumed_step if resumed_step > 0 else -1)
        self._file = run_dir.metrics.open("a", encoding="utf-8")

    def log(self, row: MetricsRow) -> None:
        _append(self._file, [{key: jsonable(value) for key, value in row.items()}])

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        keep_rows_until(self._samples, step - 1)        # an evaluation that a kill cut off is made again
        with self._samples.open("a", encoding="utf-8") as file:
            _append(file, rows)

    def finish(self, summary: MetricsRow) -> None:
        """Also tells what the files of rows are now: all are written, the guard's too."""
        self._file.close()
        there = [path.name for path in _files(self._run_dir) if path.is_file()]
        write_json(self._run_dir.checksums, sealed(checksums(self._run_dir.path, there)))


def _append(file: IO[str], rows: Iterable[Mapping[str, Any]]) -> None:
    file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    file.flush()
    os.fdatasync(file.fileno())                         # 0.2 ms on a local disk: nothing beside a step


def keep_rows_until(path: Path, step: int) -> None:
    """Drops rows after `step`, and what a kill left half-written. The file is replaced in one go."""
    if not path.exists():
        return
    old = path.read_bytes()
    kept = b"".join(line for line in old.splitlines(keepends=True) if _is_row_until(line, step))
    if kept == old:
        return
    log.info("%s: %d of %d lines stay, up to step %d", path, kept.count(b"\n"), len(old.splitlines()), step)
    write_atomic(path, kept)


def restore_run(run_dir: RunDir, checkpoint: Path, say: Callable[[str], None]) -> None:
    """Where a file of the run's rows does not begin with what its copy in the checkpoint holds, or is not as the run
    left it at its end, all of them become their copies, and `say` tells it: what came after is of steps and of an
    evaluation that are done again."""
    if not (checkpoint / run_dir.metrics.name).is_file():            # of an earlier version
        return
    copies = {path: _rows_in(checkpoint / path.name) for path in _files(run_dir)}
    at_end = found_sealed(run_dir.checksums) or {}
    wrong = {path: path.is_file() for path, copy in copies.items()
             if not (_rows_in(path).startswith(copy) and _is_as(path, at_end.get(path.name)))}
    for path, was_there in wrong.items():
        rows = copies[path].count(b"\n")
        say(f"{path.name} was {'damaged' if was_there else 'missing'}: {rows} row{'s' * (rows != 1)} restored from "
            f"{checkpoint.name}")
    for path, copy in copies.items() if wrong else ():
        if copy or path.is_file():
            write_atomic(path, copy)


def _files(run_dir: RunDir) -> tuple[Path, ...]:
    return run_dir.metrics, run_dir.samples, run_dir.guard


def _is_as(path: Path, at_end: Checksum | None) -> bool:
    """Whether the file is as it was at the end of the run, where that is known."""
    return at_end is None or (path.is_file() and checksum(path) == at_end)


def _rows_in(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _is_row_until(line: bytes, step: int) -> bool:
    row = row_of(line, STEP) if line.endswith(b"\n") else None
    if row is None:
        log.warning("a line was not whole and is dropped: %r", line[:80])
    return row is not None and row["step"] <= step
