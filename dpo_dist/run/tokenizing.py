"""The tokenized pairs, for all ranks: found on disk, or made by as many processes as the data is worth, on every node.

The processes are started by the ranks and end with them. Each reads the files itself, and they meet in a temporary
folder of data.cache_dir, which all nodes share; see data/parts.py.
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.files import read_records
from dpo_dist.data.locate import data_bytes, data_files
from dpo_dist.data.parts import begin_parts, join_parts, part_folder, records_done
from dpo_dist.data.prepare import build, built, data_sets, is_whole, open_stores, store_folder
from dpo_dist.data.store import PairStore
from dpo_dist.data.tokenize import PairTokenizer
from dpo_dist.models.file_digests import tokenizer_digest
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.run.tokenize_part import Spec
from dpo_dist.runtime import child_process, preemption
from dpo_dist.runtime.cores import usable_cores
from dpo_dist.runtime.preemption import Stopped
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World, own_node

BYTES_A_PROCESS = 16 << 20               # text that a process tokenizes in about twice the time that its start takes
SECONDS_BETWEEN_LOOKS = 0.2
RECORDS_BETWEEN_LOOKS = 50_000           # while they are counted
# there is a process for each core, so none has threads beside; and each tokenizes without a GPU
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
              "CUDA_VISIBLE_DEVICES": ""}
ENDED = "parts/ended"                    # a file in the temporary folder: a rank has failed, or was told to stop


@dataclass(frozen=True)
class Job:
    """Where the pairs are; and if they are not there yet, where they are made, and which parts each rank makes."""

    folder: Path
    temporary: Path | None = None
    of_ranks: Sequence[Sequence[int]] = ()

    @property
    def parts(self) -> int:
        return sum(map(len, self.of_ranks))


def tokenized_pairs(config: DataConfig, model: Path, world: World,
                    terminal: Terminal) -> tuple[PairStore, PairStore]:
    """(training pairs, held-out pairs), tokenized as the model in that folder asks for. All ranks call this."""
    machines = world.gather((own_node()[0], usable_cores()))
    with ExitStack() as building:                                  # on rank 0: ends with the folder's own name
        job = world.on_main(lambda: _begin(config, model, machines, building, terminal))
        if job.temporary is not None:
            _make(config, model, job, world, terminal)
    world.barrier()                                                # the folder has its name
    return open_stores(job.folder)


def _begin(config: DataConfig, model: Path, machines: Sequence[tuple[int, frozenset[int]]], building: ExitStack,
           terminal: Terminal) -> Job:
    tokenizer = load_tokenizer(model)
    folder = store_folder(config, tokenizer, tokenizer_digest(model))
    if is_whole(folder, terminal.say):
        return Job(folder)
    encoder = PairTokenizer.of(tokenizer, config)                  # what is wrong with the template is said at once
    sources = [data_set.config for data_set in data_sets(config)]
    worth = sum(map(data_bytes, sources)) // BYTES_A_PROCESS
    if worth < 2:
        build(config, encoder, folder)
        return Job(folder)
    cores = cores_of_ranks(machines)
    if any(data_files(source) is None for source in sources):      # only this machine is known to have a hub set
        cores = [n if node == machines[0][0] else 0 for n, (node, _) in zip(cores, machines, strict=True)]
    job = Job(folder, building.enter_context(built(folder)), parts_of_ranks(cores, worth))
    assert job.temporary is not None
    begin_parts(job.temporary, job.parts)
    Spec(config, model, job.parts).write(job.temporary)
    return job


def cores_of_ranks(machines: Sequence[tuple[int, frozenset[int]]]) -> list[int]:
    """Each rank's share of its machine's cores, at least one: of (its machine, the cores that it may use) of all ranks,
    which may be bound to cores of their own or share them all."""
    shares = {}
    for node in {node for node, _ in machines}:
        own = [cores for other, cores in machines if other == node]
        shares[node] = max(1, len(frozenset().union(*own)) // len(own))
    return [shares[node] for node, _ in machines]


def parts_of_ranks(cores: Sequence[int], worth: int) -> list[list[int]]:
    """Which parts each rank makes, of no more than are worth it: spread evenly, and as many as it has cores at most."""
    turns = sorted((turn, rank) for rank, n in enumerate(cores) for turn in range(n))
    return [[part for part, (_, taker) in enumerate(turns[:worth]) if taker == rank] for rank in range(len(cores))]


def _make(config: DataConfig, model: Path, job: Job, world: World, terminal: Terminal) -> None:
    """Returns when the stores are complete. Raises what one process alone would have raised, or Stopped."""
    temporary, own, began = job.temporary, job.of_ranks[world.rank], time.monotonic()
    assert temporary is not None
    with closing(_progress(config, job, terminal, world.is_main)) as bar:
        with preemption.noted():
            signals = world.together(lambda: _run(own, temporary, lambda: next(bar, None)))
        next(bar, None)                                            # shows the rows of ranks that ended later
    if any(signals):
        raise Stopped(max(signals), "the pairs were not tokenized yet")
    world.on_main(lambda: join_parts(config, PairTokenizer.of(load_tokenizer(model), config), temporary, job.parts))
    terminal.say(f"tokenized by {job.parts} processes in {time.monotonic() - began:.0f} s")


def _run(parts: Sequence[int], folder: Path, look: Callable[[], None]) -> float:
    """Runs the processes of these parts to their end, or to that of another rank's; the signal that this rank was
    sent, or 0."""
    watchers: dict[int, subprocess.Popen[bytes]] = {}
    ended = False
    try:
        for part in parts:
            command = [sys.executable, "-m", "dpo_dist.run.tokenize_part", str(folder), str(part)]
            watchers[part] = child_process.start(command, _log(folder, part), {**os.environ, **ONE_THREAD})
        while not ended:
            ended = all([_has_ended(watcher, _log(folder, part)) for part, watcher in watchers.items()])
            if preemption.received() or (folder / ENDED).exists():
                break
            look()
            time.sleep(0 if ended else SECONDS_BETWEEN_LOOKS)
    finally:
        if not ended:
            (folder / ENDED).touch()
        for watcher in watchers.values():
            child_process.stop(watcher)
    return preemption.received()


def _has_ended(watcher: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether the process has ended well. RuntimeError where it ended otherwise: its mistakes are ours."""
    if watcher.poll():
        raise RuntimeError(f"a process that tokenizes ended with code {watcher.returncode}; its last words: "
                           f"{log.read_text(errors='replace')[-2000:]}")
    return watcher.returncode == 0


def _log(folder: Path, part: int) -> Path:
    return part_folder(folder, part) / "log"


def _progress(config: DataConfig, job: Job, terminal: Terminal, is_main: bool) -> Generator[None, None, None]:
    """At each `next`, shows how many rows all processes have done; at first they are counted, some at a time. Only one
    rank shows it."""
    if not is_main:
        return
    total = 0
    for data_set in data_sets(config):
        try:
            for _ in read_records(data_set.config, lambda record: False):
                total += 1
                if total % RECORDS_BETWEEN_LOOKS == 0:
                    yield
        except UserError:                                          # the processes find it too, and it is told in order
            return
    assert job.temporary is not None
    while not (done := records_done(job.temporary, job.parts)):    # their start says nothing of the time that is left
        yield
    with terminal.progress(total, done, "tokenizing") as bar:
        while True:
            if (now := records_done(job.temporary, job.parts)) > done:
                bar.update(done := now)
            yield
