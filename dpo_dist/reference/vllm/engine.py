"""The reference in vLLM: a client that has servers score sequences, and retries when servers fail."""
from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_dist.config.engines.vllm import RequestsConfig
from dpo_dist.config.errors import UserError
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.vllm.protocol import Continuation, Unanswered, score
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch

Pack = tuple[Continuation, ...]
Answers = list[Future[list[np.ndarray]]]                 # a part of the pack each

POLL_SECONDS = 0.1
FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 0.5, 15.0     # of a server that failed; doubled with each failure


class VllmReference(ReferenceEngine):
    """Each rank has packs of its own scored, by all servers at once. token_logps may be called by several threads.

    Where training asks live, a step's packs are asked for while the step before is computed, and ranks wait together.
    """

    def __init__(self, urls: Sequence[str], model: str, longest: int | None, requests: RequestsConfig, at_once: int,
                 world: World, on_close: Callable[[], None] = lambda: None):
        self._model, self._longest, self._requests, self._on_close = model, longest, requests, on_close
        self._world = world
        self._servers = _Servers(urls)
        self._threads = ThreadPoolExecutor(at_once)
        # one more than are under way, so that no server waits for this process
        self.packs_at_once = at_once + 1
        self.urls = tuple(urls)
        self._asked: dict[Pack, Answers] = {}            # what look_up and wait_for have asked
        self._waited: set[Pack] = set()                  # by the last wait_for

    def token_logps(self, batch: PackedBatch) -> Tensor:
        pack = continuations(batch)
        answers = self._asked.get(pack) or self._ask(pack)
        return batch.counted(torch.from_numpy(np.concatenate([logps for part in answers for logps in part.result()])))

    def look_up(self, batch: PackedBatch) -> None:
        self._begin(continuations(batch))                # the answers come while the step before is computed

    def wait_for(self, batches: Sequence[PackedBatch], before_waiting: Callable[[], None] = lambda: None) -> None:
        """Raises, on all ranks alike, UserError where servers fail one of them, and Stopped if a signal has come."""
        packs = {continuations(batch) for batch in batches}
        for pack in self._waited - packs:
            self._asked.pop(pack, None)
        self._waited = packs
        answers = [part for pack in packs for part in self._begin(pack)]
        waiting = False
        while self._world.max(not all(part.done() for part in answers)):
            if not waiting:
                before_waiting()
            waiting = True
            self._world.heed_signals("training was waiting for the reference")
            wait(answers, timeout=POLL_SECONDS)
        if self._world.max(any(part.exception() for part in answers)):
            self._world.together(lambda: [part.result() for part in answers])

    def one_each(self) -> Iterator[VllmReference]:
        """An engine for each server alone: an audit must not take one server's word for another's."""
        for url in self.urls:
            yield VllmReference([url], self._model, self._longest, self._requests, 1, self._world)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._on_close()

    def _begin(self, pack: Pack) -> Answers:
        """The pack's answers, which are on their way from now on, if they were not yet."""
        if pack not in self._asked:
            self._asked[pack] = self._ask(pack)
        return self._asked[pack]

    def _ask(self, pack: Pack) -> Answers:
        n = self._requests.sequences
        return [self._threads.submit(self._answered, pack[i:i + n]) for i in range(0, len(pack), n)]

    def _answered(self, sequences: Sequence[Continuation]) -> list[np.ndarray]:
        """The sequences' log-probs, in order. What fails is tried again, in halves, at whichever server is ready first.

        UserError where this request, or every server, has failed for wait_seconds, or where a sequence is too long.
        """
        longest = max(len(s.prompt) + len(s.completion) for s in sequences)
        # vLLM counts the token that it must generate, and refuses a whole request if one sequence is too long
        if self._longest is not None and longest + 1 > self._longest:
            raise UserError(f"a sequence of {longest} tokens needs servers with --max-model-len {longest + 1} or more, "
                            f"not {self._longest}; start them so, or set data.max_length={self._longest - 1}")
        todo, done = [sequences], []
        failing_since: float | None = None
        while todo:
            part = todo.pop()
            try:
                with self._servers.next() as url:
                    done += score(url, self._model, part, self._requests.timeout_seconds)
                failing_since = None
            except Unanswered as failure:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - min(failing_since, self._servers.silent_since) > self._requests.wait_seconds:
                    raise UserError(f"the reference's servers ({', '.join(self.urls)}) gave no answer for "
                                    f"{self._requests.wait_seconds:g} s; the last: {failure}. What was scored is kept: "
                                    "start them again, and the same command goes on (or raise "
                                    "reference.requests.wait_seconds)") from failure
                half = len(part) if failure.refused else (len(part) + 1) // 2
                todo += [p for p in (part[half:], part[:half]) if p]
        return done


def continuations(batch: PackedBatch) -> Pack:
    """The pack's sequences, in its order."""
    return tuple(Continuation(tuple(prompt.tolist()), tuple(completion.tolist()))
                 for prompt, completion in batch.sequences())


@dataclass
class _Server:
    url: str
    busy: int = 0
    failures: int = 0
    ready_at: float = 0.0


class _Servers:
    """Picks the server for the next request: the one that is ready first, then the least busy. A server that fails
    rests, longer each time."""

    def __init__(self, urls: Sequence[str]):
        self._all = [_Server(url) for url in urls]
        self._lock = threading.Lock()
        self.silent_since = math.inf                     # the first failure after the last answer, of any of them

    @contextmanager
    def next(self) -> Iterator[str]:
        with self._lock:
            now = time.monotonic()
            server = min(self._all, key=lambda s: (max(s.ready_at, now), s.busy))
            server.busy += 1
        try:
            time.sleep(max(0.0, server.ready_at - now))
            yield server.url
            server.failures, self.silent_since = 0, math.inf
        except Unanswered:
            with self._lock:
                now = time.monotonic()
                self.silent_since = min(self.silent_since, now)
                if now >= server.ready_at:               # several requests that fail together are one failure
                    server.failures += 1
                    server.ready_at = now + min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2 ** (server.failures - 1))
            raise
        finally:
            with self._lock:
                server.busy -= 1
