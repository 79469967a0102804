"""What a killed process may leave, here or in an earlier version: half files, stale locks and markers."""
from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from .bases import FINISHED, MIDWAY
from .trial import Trial
from .verdict import Verdict, given_once


def left(trial: Trial) -> Verdict:
    """Two or three leftovers in a run that was killed in the middle."""
    trial.begin(MIDWAY)
    for name in trial.random.sample(list(LEFTOVERS), trial.random.choice((1, 2, 3))):
        trial.tell(name)
        LEFTOVERS[name](trial.work, trial.base.folder / FINISHED, trial.random)
    return given_once(trial)


def _half(source: Path, target: Path, draw: random.Random) -> None:
    """A copy of a folder that was cut off: some files whole, one half, others not there."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    draw.shuffle(files)
    for path in files[:len(files) // 2]:
        path.unlink()
    if kept := files[len(files) // 2:]:
        kept[0].write_bytes(kept[0].read_bytes()[:kept[0].stat().st_size // 2])
    (target / "COMPLETE").unlink(missing_ok=True)


def _half_checkpoint(work: Path, finished: Path, draw: random.Random) -> None:
    step = draw.choice((4, 8, 12, 14))                   # where it is whole, it loses its marker
    source = work / "run/checkpoints/step-000008"
    if step == 8:
        return (source / "COMPLETE").unlink()
    _half(source, work / f"run/checkpoints/step-{step:06d}", draw)


def _half_model(work: Path, finished: Path, draw: random.Random) -> None:
    _half(finished / "run/model", work / draw.choice(("run/model", "run/model.partial")), draw)


def _half_store(work: Path, finished: Path, draw: random.Random) -> None:
    store = next(path.parent for path in sorted(work.glob("tokens/*/asked.json")))
    _half(store, store.with_name(f"{store.name}.tmp-1234"), draw)


def _half_shard(work: Path, finished: Path, draw: random.Random) -> None:
    shard = draw.choice(sorted(work.glob("reference/*/*.safetensors")))
    content = shard.read_bytes()
    shard.with_name("0" * 32 + ".safetensors").write_bytes(content[:draw.randrange(len(content))])


def _temporary(work: Path, finished: Path, draw: random.Random) -> None:
    for folder, name in (("run", "run.json"), ("run", "report.html"), ("tokens/digests", "a.json"),
                         ("run/visits", "steps-000009-000012-rank-0.parquet"), ("run", "DONE")):
        (work / folder).mkdir(exist_ok=True, parents=True)
        (work / folder / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")


def _lock(work: Path, finished: Path, draw: random.Random) -> None:
    for path in [work / "run/.lock", *(folder / ".lock" for folder in work.glob("tokens/*") if folder.is_dir()),
                 *(folder / ".lock" for folder in work.glob("reference/*"))]:
        path.write_text(f"{draw.randrange(1 << 22)}\n")


def _marker(work: Path, finished: Path, draw: random.Random) -> None:
    content = draw.choice(('{"message": "earlier", "exit_code": 1}', '{"message": "ear', "",
                           '{"message": "earlier", "signal": 15}'))
    (work / "run" / draw.choice(("FAILED", "PREEMPTED", "DONE"))).write_text(content)


def _half_row(work: Path, finished: Path, draw: random.Random) -> None:
    rows = (finished / "run/metrics.jsonl").read_text()
    (work / "run/metrics.jsonl").write_text(rows[:draw.randrange(len(rows) // 2, len(rows))])


def _foreign_rows(work: Path, finished: Path, draw: random.Random) -> None:
    """Rows of steps after the checkpoint."""
    with (work / "run/metrics.jsonl").open("a") as file:
        for step in range(9, 13):
            file.write(json.dumps({"step": step, "split": "train", "loss": 0.1}) + "\n")


def _later_visits(work: Path, finished: Path, draw: random.Random) -> None:
    for path in finished.glob("run/visits/*"):
        shutil.copy2(path, work / "run/visits" / path.name)


def _copies_of_a_person(work: Path, finished: Path, draw: random.Random) -> None:
    """Beside what they are copies of, under names of the person's own."""
    for path in (work / "run/checkpoints/step-000004", work / "run/checkpoints/step-000008"):
        shutil.copytree(path, path.with_name(path.name + draw.choice((".bak", " (copy)", "-old"))))
    for path in sorted((work / "run/evaluations").iterdir()):
        shutil.copy2(path, path.with_name(draw.choice(("step-old", "step-1", "copy")) + path.name[-14:]))


LEFTOVERS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "a half checkpoint": _half_checkpoint, "a half model": _half_model, "a half token store": _half_store,
    "a half shard of the reference": _half_shard, "temporary files": _temporary, "stale locks": _lock,
    "an earlier marker": _marker, "half a metrics row": _half_row, "metrics of later steps": _foreign_rows,
    "visits of later steps": _later_visits, "a person's copies": _copies_of_a_person}
