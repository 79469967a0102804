"""The reference in vLLM: a client that has servers score sequences, and retries when servers fail."""
from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_dist.config.engines.vllm import RequestsConfig
from dpo_dist.config.errors import UserError
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.vllm.protocol import Continuation, Unanswered, score
from dpo_dist.types import PackedBatch

FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 0.5, 15.0     # of a server that failed; doubled with each failure


class VllmReference(ReferenceEngine):
    """Each rank has packs of its own scored, by all servers at once. token_logps may be called by several threads."""

    def __init__(self, urls: Sequence[str], model: str, longest: int | None, requests: RequestsConfig, at_once: int,
                 on_close: Callable[[], None] = lambda: None):
        self._model, self._longest, self._requests, self._on_close = model, longest, requests, on_close
        self._servers = _Servers(urls)
        self._threads = ThreadPoolExecutor(at_once)
        # one more than are under way, so that no server waits for this process
        self.packs_at_once = at_once + 1
        self.urls = tuple(urls)

    def token_logps(self, batch: PackedBatch) -> Tensor:
        sequences = continuations(batch)
        longest = max(len(s.prompt) + len(s.completion) for s in sequences)
        # vLLM counts the token that it must generate, and refuses a whole request if one sequence is too long
        if self._longest is not None and longest + 1 > self._longest:
            raise UserError(f"a sequence of {longest} tokens needs servers with --max-model-len {longest + 1} or more, "
                            f"not {self._longest}; start them so, or set data.max_length={self._longest - 1}")
        n = self._requests.sequences
        parts = self._threads.map(self._answered, [sequences[i:i + n] for i in range(0, len(sequences), n)])
        return batch.counted(torch.from_numpy(np.concatenate([logps for part in parts for logps in part])))

    def one_each(self) -> Iterator[VllmReference]:
        """An engine for each server alone: an audit must not take one server's word for another's."""
        for url in self.urls:
            yield VllmReference([url], self._model, self._longest, self._requests, 1)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._on_close()

    def _answered(self, sequences: Sequence[Continuation]) -> list[np.ndarray]:
        """The sequences' log-probs, in order. What fails is tried again, in halves, at whichever server is ready first.

        UserError where this request, or every server, has failed for wait_seconds.
        """
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


def continuations(batch: PackedBatch) -> list[Continuation]:
    """The pack's sequences, in its order."""
    return [Continuation(tuple(prompt.tolist()), tuple(completion.tolist()))
            for prompt, completion in batch.sequences()]


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
