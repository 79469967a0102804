"""`dpo-dist score`: fills the cache with the reference's log-probs of all pairs, training and held out, and nothing else."""
from __future__ import annotations

import sys

from dpo_dist.config import RunConfig, UserError
from dpo_dist.engines import fill_cache
from dpo_dist.entry import exit_with, run_entry
from dpo_dist.inputs import read_inputs
from dpo_dist.terminal import Terminal
from dpo_dist.world import World


def score(config: RunConfig, world: World, terminal: Terminal) -> None:
    if not config.loss.needs_reference:
        raise UserError(f"loss.name={config.loss.name} uses no reference, so there is nothing to score; choose another loss")
    inputs = read_inputs(config, world, terminal)
    terminal.say(str(fill_cache(config, inputs, [inputs.train, inputs.eval], world, terminal)))


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], score))
