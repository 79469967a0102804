"""`dpo-dist score`: fills the cache with the reference's log-probs of all pairs, training and held out.

With reference.mode=ahead it goes through them in the order in which training asks, and its run.dir lies in the
trainer's.
"""
from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import make_sampler
from dpo_dist.reference.cache.scoring_order import windows
from dpo_dist.run.inputs import read_inputs
from dpo_dist.run.lm_eval import check_harness
from dpo_dist.run.open_models import fill_cache, without_auto
from dpo_dist.runtime import preemption
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.lock import hold_lock, is_held
from dpo_dist.runtime.process import run_entry, stop_now
from dpo_dist.runtime.run_dir import DONE, RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World

SECONDS_BETWEEN_LOOKS = 1.0


def score(config: RunConfig, world: World, terminal: Terminal) -> None:
    preemption.listen(partial(stop_now, config, terminal))
    if not config.loss.needs_reference:
        raise UserError(f"loss.name={config.loss.name} uses no reference, so there is nothing to score; choose another "
                        "loss")
    world.on_main(lambda: check_harness(config.eval.harness))            # of a later stage: nothing is in vain
    if config.reference.mode == "ahead":
        _score_ahead(config, world, terminal)
    else:
        inputs = read_inputs(config, world, terminal)
        config = without_auto(config, inputs, None, world, terminal)           # adapter_off scores with the policy
        _, counts = fill_cache(config, inputs, [inputs.train, inputs.eval], world, terminal)
        terminal.say(counts)


def _score_ahead(config: RunConfig, world: World, terminal: Terminal) -> None:
    """Scores in the order in which training will ask. Each side sees by the other's lock that it is alive."""
    folder, t = Path(config.run_dir), config.train
    with ExitStack() as alive:
        world.on_main(lambda: _begin(folder, alive))
        inputs = read_inputs(config, world, terminal)
        order = make_sampler(inputs.train, t, config.data.group_by_prompt)
        scoring_order = windows(order, t.epochs, t.max_steps, len(inputs.train), len(inputs.eval))
        look = _end_with(folder.parent) if world.is_main else (lambda: None)
        _, counts = fill_cache(config, inputs, [inputs.train, inputs.eval], world, terminal, windows=scoring_order,
                               progress=look)
        terminal.say(counts)
        world.on_main(RunDir(folder).mark_done)


def _begin(folder: Path, alive: ExitStack) -> None:
    alive.enter_context(hold_lock(folder))
    RunDir(folder).clear(DONE)


def _end_with(training: Path) -> Callable[[], None]:
    """A function that looks now and then whether training is at work in its folder. Where it was and has ended, this
    process is asked to stop."""
    seen, last = False, time.monotonic()

    def look() -> None:
        nonlocal seen, last
        if time.monotonic() - last > SECONDS_BETWEEN_LOOKS:
            last, held = time.monotonic(), is_held(training)
            if seen and not held:
                preemption.receive(signal.SIGTERM)
            seen |= held

    return look


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], score))
