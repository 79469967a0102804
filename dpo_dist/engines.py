"""The models of a run, opened in an order that never holds the reference and the policy at once without need."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_dist.config import RunConfig
from dpo_dist.data.store import PairStore
from dpo_dist.inputs import Inputs
from dpo_dist.policy import Policy
from dpo_dist.policy.make import make_policy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.cache import LogpCache
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.fill import fill, plan
from dpo_dist.reference.make import make_reference
from dpo_dist.terminal import Terminal
from dpo_dist.world import World


@dataclass(frozen=True)
class Scored:
    """A cache that holds every pair, and how many sequences were computed now and found there."""

    cache: LogpCache
    scored: int
    cached: int

    def __str__(self) -> str:
        return f"scored {self.scored}, cached {self.cached}"


def open_engines(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World,
                 terminal: Terminal) -> tuple[Policy, ReferenceEngine | None]:
    """The policy, and where the reference log-probs of `data_sets` come from (None for a loss without a reference)."""
    def policy() -> Policy:
        return make_policy(config, inputs.policy_folder, inputs.attention, world)

    if not config.loss.needs_reference:
        return policy(), None
    if config.reference.engine == "adapter_off":          # the reference is the policy: it must be there first
        learner = policy()
        engine = make_reference(config.reference, inputs.reference_folder, inputs.dtype, inputs.reference_attention, world, learner)
        if config.reference.mode == "live":
            return learner, engine
        return learner, CachedReference(fill_cache(config, inputs, data_sets, world, terminal, learner).cache)
    if config.reference.mode == "live":
        engine = make_reference(config.reference, inputs.reference_folder, inputs.dtype, inputs.reference_attention, world)
        return policy(), engine
    scored = fill_cache(config, inputs, data_sets, world, terminal)      # the reference is freed before the policy is loaded
    return policy(), CachedReference(scored.cache)


def fill_cache(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World, terminal: Terminal,
               policy: Policy | None = None) -> Scored:
    """Scores what the cache does not hold of these pairs. The model is loaded only where something is missing."""
    cache = LogpCache(config.reference.cache_dir, inputs.reference_key)
    scoring = plan(cache, data_sets, world, config.train.tokens_per_microbatch)
    if scoring.n_damaged_shards:
        terminal.say(f"reference cache: {scoring.n_damaged_shards} damaged shards set aside (*.corrupt in {cache.folder}); scored again")
    if scoring.n_missing:
        if config.reference.engine == "adapter_off" and policy is None:
            policy = make_policy(config, inputs.policy_folder, inputs.attention, world)
        engine = make_reference(config.reference, inputs.reference_folder, inputs.dtype, inputs.reference_attention, world, policy)
        with terminal.progress(scoring.n_missing, description="reference") as bar:
            fill(scoring, cache, data_sets, engine, world, bar.update)
        engine.close()
    return Scored(cache, scoring.n_missing, scoring.n_cached)
