"""Undisturbed runs, one a configuration, with copies of their folders as a trial begins from: before the run, with
filled caches, in the middle with two checkpoints, and finished."""
from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import eval_on, train_on, write_rows, write_tiny_llama

from . import commands
from .results import Results

# name: overrides; how often a trial takes it
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], int]] = {
    "zero3": (("zero=zero3", "cluster.procs_per_node=2"), 5),
    "one": (("zero=none", "cluster.procs_per_node=1"), 2),
    "zero2": (("zero=zero2", "cluster.procs_per_node=2"), 1),
    "lora": (("zero=zero3", "cluster.procs_per_node=2", "model.lora.rank=4"), 1),
    "best": (("zero=zero3", "cluster.procs_per_node=2", "train.keep_best=loss"), 1)}
STEPS = 14
FRESH, CACHED, MIDWAY, FINISHED = STATES = ("fresh", "cached", "midway", "finished")
MIDWAY_STEP = 8                  # the second checkpoint


@dataclass(frozen=True)
class Base:
    name: str
    folder: Path                 # with a folder for each state
    seconds: float               # of the undisturbed run
    results: Results             # what it left

    def copy(self, state: str, work: Path) -> None:
        """Puts the folder of a trial into this state."""
        shutil.copytree(self.folder / state, work, symlinks=True)


def words(configuration: str) -> list[str]:
    return ["train", "model.path=m", train_on(Path("rows.jsonl")), eval_on(Path("held_out.jsonl")),
            "cluster.device=cpu", "model.dtype=fp32", "data.cache_dir=tokens", "data.max_length=256",
            "reference.cache_dir=reference", "cluster.timeout_seconds=60", "train.pairs_per_step=6",
            f"train.max_steps={STEPS}", "train.save_every_steps=4", "train.eval_every_steps=4", "optim.lr=1e-3",
            "loss.beta=0.5", "train.tokens_per_microbatch=600", *CONFIGURATIONS[configuration][0], "run.dir=run"]


def write_inputs(folder: Path) -> None:
    """The model and the rows that every configuration trains on."""
    write_tiny_llama(folder / "m")
    write_rows(folder / "rows.jsonl", 90)
    write_rows(folder / "held_out.jsonl", 10, seed=1)


def make_base(name: str, inputs: Path, folder: Path, work: Path) -> Base:
    """Runs the configuration undisturbed in the folder `work`, and once more until it has two checkpoints."""
    folder.mkdir(parents=True)
    shutil.copytree(inputs, folder / FRESH)
    shutil.copytree(inputs, work)
    began = time.monotonic()
    attempt = commands.finish(commands.start(words(name), work, {}), work, began)
    assert attempt.code == 0, attempt.terminal
    seconds = attempt.seconds
    shutil.copytree(work, folder / FINISHED)
    shutil.rmtree(work / "run")
    shutil.copytree(work, folder / CACHED)
    while not _in_the_middle(name, work):
        shutil.rmtree(work / "run")
    shutil.copytree(work, folder / MIDWAY)
    shutil.rmtree(work)
    return Base(name, folder, seconds, Results.of(folder / FINISHED / "run"))


def _in_the_middle(name: str, work: Path) -> bool:
    """Kills a run once its second checkpoint is whole; whether it was in time."""
    process = commands.start(words(name), work, {})
    marker = work / "run/checkpoints" / f"step-{MIDWAY_STEP:06d}/COMPLETE"
    while not marker.exists() and process.poll() is None:
        time.sleep(0.002)
    commands.end(process, work)
    process.wait()
    whole = sorted(path.parent.name for path in work.glob("run/checkpoints/step-*/COMPLETE"))
    return whole == ["step-000004", f"step-{MIDWAY_STEP:06d}"] and not (work / "run" / "DONE").exists()
