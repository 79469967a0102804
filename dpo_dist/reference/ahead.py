"""reference.mode=ahead: other processes score while training runs; training waits for what is missing."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from dpo_dist.config.errors import UserError
from dpo_dist.reference.cache.store import LogpCache, sequence_key
from dpo_dist.reference.cached import CachedReference
from dpo_dist.runtime.lock import is_held
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch

POLL_SECONDS = 0.1


class Scorer:
    """The scoring processes as others see them: by the folder where they run, whose lock they hold while they live."""

    def __init__(self, folder: Path, patience_seconds: float):
        self._folder, self._run_dir = folder, RunDir(folder)
        self._patience, self._last_answer = patience_seconds, time.monotonic()

    def answered(self) -> None:
        """Starts the wait again."""
        self._last_answer = time.monotonic()

    def is_alive(self) -> bool:
        """False if they have ended. True also while they have yet to start, or start again; UserError after too long a
        silence."""
        alive = is_held(self._folder)
        silent = time.monotonic() - self._last_answer
        if silent > self._patience:
            state = ("there, but stuck" if alive
                     else "not there: start `dpo-dist score` with the same overrides beside this")
            raise UserError(f"no reference log-prob has come for {silent:.0f} s; the scoring processes in "
                            f"{self._folder} are {state}. cluster.timeout_seconds is the limit")
        return alive or not (self._run_dir.is_done or self._run_dir.failure() is not None)

    def last_words(self) -> str:
        failure = self._run_dir.failure()
        return failure.message if failure else "they say that all is done, so a file of the cache is lost"


class AheadReference(CachedReference):
    """The cache while it is being filled. Ranks wait together in short turns, so all keep up with collectives."""

    def __init__(self, cache: LogpCache, world: World, scorer: Scorer, say: Callable[[str], None]):
        super().__init__(cache)
        self._world, self._scorer, self._say = world, scorer, say
        self._waited_seconds = 0.0

    def wait_for(self, batches: Sequence[PackedBatch], before_waiting: Callable[[], None] = lambda: None) -> None:
        """Raises, on all ranks alike, UserError if the values cannot come, and Stopped if a signal has come."""
        began = time.perf_counter()
        self._scorer.answered()                          # the silence counts from now: nobody asked during the step
        wanted = [sequence_key(prompt, completion) for batch in batches for prompt, completion in batch.sequences()]
        waiting = False
        while self._world.max(any(key not in self._cache for key in wanted)):
            if not waiting:
                before_waiting()
            waiting = True
            self._world.heed_signals("training was waiting for the reference")
            # checked before looking for shards, so that the last ones are not missed
            alive = self._world.on_main(self._scorer.is_alive)
            if self._cache.add_new_shards(self._world):
                self._scorer.answered()
            elif alive:
                time.sleep(POLL_SECONDS)
            else:
                raise UserError("the scoring processes have ended before all was scored: "
                                f"{self._world.on_main(self._scorer.last_words)}. What they scored and what was "
                                "trained is kept: the same command goes on from there")
        self._waited_seconds += time.perf_counter() - began

    def look_up(self, batch: PackedBatch) -> Tensor | None:
        return None                                      # they may not be there yet: wait_for handles that

    def close(self) -> None:
        self._say(f"reference: scored while training ran, which waited {self._waited_seconds:.1f} s for it in all")
