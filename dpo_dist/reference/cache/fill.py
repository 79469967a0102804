"""Fills the cache: scores what is missing of a data set, spread over the ranks."""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain

from torch import Tensor

from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.data.store import Pairs, PairStores
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.cache.scoring_order import Indexes
from dpo_dist.reference.cache.scoring_plan import ScoringPlan, plan_scoring
from dpo_dist.reference.cache.store import LogpCache, ShardWriter, sequence_key
from dpo_dist.runtime import preemption
from dpo_dist.runtime.later import Later
from dpo_dist.runtime.watchdog import sign
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch

Scored = tuple[PackedBatch, Tensor]

# a round is one pack a rank; agreeing to stop holds the ranks together for a moment
ROUNDS_BETWEEN_AGREEMENTS = 8


def open_cache(cache: LogpCache, world: World) -> int:
    """Opens, on every rank, the shards that rank 0 found whole. Returns how many were damaged."""
    names, damaged = world.on_main(cache.verified_shards)
    cache.open_shards(names)
    return damaged


def plan_fill(cache: LogpCache, data_sets: Sequence[Pairs], world: World, tokens_per_microbatch: int,
              windows: Indexes | None = None, padded: bool = False) -> tuple[ScoringPlan, int]:
    """(what is missing, how many shards were damaged), made on rank 0. `windows` and `padded`: as in plan_scoring."""
    damaged = open_cache(cache, world)
    return world.on_main(lambda: plan_scoring(cache, data_sets, tokens_per_microbatch, windows, padded)), damaged


def fill(scoring: ScoringPlan, cache: LogpCache, data_sets: Sequence[Pairs], engine: ReferenceEngine, world: World,
         progress: Callable[[int], None] = lambda done: None, flush_seconds: float = math.inf) -> None:
    """Scores the plan's packs into the cache. What is scored reaches the disk within `flush_seconds`. After each of
    this rank's packs, `progress` is told how many sequences the packs of all ranks up to there hold.

    Raises Stopped, with what is scored kept, where any rank was asked to end.
    """
    with preemption.noted():
        _fill(scoring, cache, data_sets, engine, world, progress, flush_seconds)
    open_cache(cache, world)


def _fill(scoring: ScoringPlan, cache: LogpCache, data_sets: Sequence[Pairs], engine: ReferenceEngine, world: World,
          progress: Callable[[int], None], flush_seconds: float) -> None:
    writer = ShardWriter(cache, flush_seconds)
    pairs = PairStores(data_sets)
    starts = range(0, scoring.n_packs, world.size)
    # Where nothing is left for this rank, rank 0's pack is forwarded as well (the law: equal forwards), and not kept.
    mine = [start + world.rank if start + world.rank < scoring.n_packs else start for start in starts]
    packs = (pack_sequences([_sequences(tree, pairs) for tree in scoring.pack(j)]) for j in mine)
    done = 0

    def while_waiting() -> None:
        writer.flush_if_due()
        preemption.heed("")                              # for servers, nobody waits longer than that

    scored = _scored(packs, engine, world.device.type == "cuda", while_waiting)
    try:
        for i, (start, j, (pack, logps)) in enumerate(zip(starts, mine, scored, strict=True)):
            if j == start + world.rank:
                _keep(writer, pack, logps)
            done = int(scoring.trees[scoring.packs[min(start + world.size, scoring.n_packs)]])
            progress(done)
            sign()
            if i % ROUNDS_BETWEEN_AGREEMENTS == 0:
                world.heed_signals(_kept(done))
    except preemption.Stopped as stopped:
        if not stopped.kept:                             # this rank alone: the others learn of it where they agree next
            world.heed_signals(_kept(done))
        raise
    finally:                                 # what is scored is kept, whatever ends the scoring
        writer.flush()
    world.heed_signals(_kept(done))


def _kept(done: int) -> str:
    return f"{done} sequences are scored"


def _scored(packs: Iterable[PackedBatch], engine: ReferenceEngine, pinned: bool,
            while_waiting: Callable[[], None]) -> Iterator[Scored]:
    """(pack, its log-probs on the CPU), in order. An engine in other processes sets `packs_at_once`, so that its
    servers never wait for this process. pinned: packs lie in memory from which a GPU copies without holding up the
    process."""
    if engine.packs_at_once == 1:
        yield from _one_ahead(packs, engine, pinned)
        return
    pool = ThreadPoolExecutor(engine.packs_at_once)
    under_way: deque[tuple[PackedBatch, Future[Tensor]]] = deque()
    try:
        for pack in chain(packs, [None]):
            if pack is not None:
                under_way.append((pack, pool.submit(engine.token_logps, pack)))
            while under_way and (pack is None or len(under_way) == engine.packs_at_once):
                first, answer = under_way.popleft()
                while wait([answer], timeout=1.0).not_done:
                    while_waiting()
                yield first, answer.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)       # after a failure nobody waits for the rest


def _one_ahead(packs: Iterable[PackedBatch], engine: ReferenceEngine, pinned: bool) -> Iterator[Scored]:
    """As _scored: while a GPU computes a pack, the next one is laid out and queued, and the one before is kept."""
    under_way: deque[tuple[PackedBatch, Later]] = deque()
    for pack in chain(packs, [None]):
        if pack is not None:
            under_way.append((pack, Later(engine.token_logps(pack.pinned() if pinned else pack))))
        while under_way and (pack is None or len(under_way) == 2 or not under_way[0][1].is_on_its_way):
            first, answer = under_way.popleft()
            yield first, answer.values


def _keep(writer: ShardWriter, pack: PackedBatch, logps: Tensor) -> None:
    for (prompt, completion), values in zip(pack.sequences(), pack.split(logps), strict=True):
        writer.add(sequence_key(prompt, completion), values.numpy())
    writer.flush_if_due()


def _sequences(tree: Indexes, pairs: PairStores[Pairs]) -> Sequences:
    """The token ids of a tree, by its sequences' places in the data."""
    prompt = pairs.parts(int(tree[0]) // 2)[0]
    completions = [pairs.parts(sequence // 2)[1 + sequence % 2] for sequence in tree.tolist()]
    return Sequences(tuple(prompt.tolist()), tuple(tuple(completion.tolist()) for completion in completions))
