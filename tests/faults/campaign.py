"""Which trials a campaign has, and their running, two at a time."""
from __future__ import annotations

import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from .bases import CONFIGURATIONS, Base, make_base, write_inputs
from .kinds import KINDS
from .trial import Trial
from .verdict import LOST, Verdict


@dataclass(frozen=True)
class Ended:
    kind: str
    number: int
    verdict: Verdict
    told: list[str]
    seconds: float


def drawn(trials: int, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """(kind, its number) of each trial, in turn: each kind by its share, as evenly as can be."""
    counts = dict.fromkeys(kinds, 0)
    order = []
    for _ in range(trials):
        kind = min(kinds, key=lambda name: (counts[name] + 1) / KINDS[name].share)
        order.append((kind, counts[kind]))
        counts[kind] += 1
    return order


def run(trials: Sequence[tuple[str, int]], seed: int, lanes: int, show: Callable[[Ended], None],
        among: Sequence[str] = tuple(CONFIGURATIONS)) -> list[Ended]:
    """Runs the trials, `lanes` at a time, each with one of these configurations, and shows each as it ends. The folders
    are removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="dpo-dist-faults-"))
    try:
        names = sorted({configuration(kind, number, seed, among) for kind, number in trials})
        write_inputs(root / "inputs")
        with ThreadPoolExecutor(lanes) as pool:
            made = pool.map(lambda name: make_base(name, root / "inputs", root / "bases" / name, root / f"work-{name}"),
                            names)
            bases = dict(zip(names, made, strict=True))
        free: SimpleQueue[Path] = SimpleQueue()
        for lane in range(lanes):
            free.put(root / f"lane-{lane}")
        with ThreadPoolExecutor(lanes) as pool:
            def one(which: tuple[str, int]) -> Ended:
                work = free.get()
                try:
                    ended = run_trial(*which, seed, bases[configuration(*which, seed, among)], work)
                finally:
                    free.put(work)
                show(ended)
                return ended
            return list(pool.map(one, trials))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run_trial(kind: str, number: int, seed: int, base: Base, work: Path) -> Ended:
    began = time.monotonic()
    trial = Trial(kind, seed, number, base, work, random.Random(f"{seed} {kind} {number}"))
    try:
        verdict = KINDS[kind].strike(trial)
    except Exception:
        verdict = Verdict(LOST, f"the campaign itself failed: {traceback.format_exc()[-1500:]}")
    finally:
        trial.end()
        shutil.rmtree(work, ignore_errors=True)
    return Ended(kind, number, verdict, trial.told, time.monotonic() - began)


def configuration(kind: str, number: int, seed: int, among: Sequence[str]) -> str:
    names = [name for name in among if name in (KINDS[kind].bases or CONFIGURATIONS)]
    draw = random.Random(f"{seed} {kind} {number} configuration")
    return draw.choices(names, [CONFIGURATIONS[name][1] for name in names])[0]
