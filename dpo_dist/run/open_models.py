"""The models of a run, opened in an order that never holds the reference and the policy at once without need."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo_dist.config.errors import UserError
from dpo_dist.config.reference import OutsideConfig
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.store import PairStore
from dpo_dist.policy import Policy
from dpo_dist.policy.make import make_policy
from dpo_dist.reference import OutsideEngine, ReferenceEngine
from dpo_dist.reference.ahead import AheadReference, Scorer
from dpo_dist.reference.audit import audit, believe_earlier_audit
from dpo_dist.reference.cache.fill import fill, open_cache, plan_fill
from dpo_dist.reference.cache.scoring_order import Indexes
from dpo_dist.reference.cache.store import LogpCache
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.make import make_reference
from dpo_dist.reference.tr_dpo import HasWeights, TrDpoReference
from dpo_dist.run.checkpoint import latest_checkpoint, read_state
from dpo_dist.run.inputs import Inputs
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.sizing import estimate
from dpo_dist.sizing.automatic import choose, is_automatic, without_sizes
from dpo_dist.sizing.shape import read_shape

# share of a GPU's memory that predictions may fill: predictions err, and memory fragments
USABLE = 0.9
# scores for a waiting training are written at least this often (at the beginning every second)
SECONDS_BEFORE_SHARED = 30.0


@dataclass(frozen=True)
class Scored:
    """A cache that holds every pair, and how many sequences were computed now and found there."""

    cache: LogpCache
    scored: int
    cached: int

    def __str__(self) -> str:
        return f"scored {self.scored}, cached {self.cached}"


def without_auto(config: RunConfig, inputs: Inputs, world: World, terminal: Terminal) -> RunConfig:
    """The config with zero.stage and model.gradient_checkpointing chosen where they are `auto`, the same on every rank.
    A run that goes on keeps the stage of its checkpoint. All ranks call it."""
    if not is_automatic(config):
        return config
    on_gpu, tells = world.device.type == "cuda", world.device.type == "cuda" or config.zero.stage == "auto"
    saved = world.on_main(lambda: latest_checkpoint(RunDir(Path(config.run_dir))))
    if config.zero.stage == "auto" and saved is not None:
        config = estimate.with_zero(config, stage=read_state(saved).zero_stage)
    device = estimate.CPU
    if on_gpu:
        memory = -world.max(-float(torch.cuda.get_device_properties(world.device).total_memory))
        device = replace(estimate.GPU_80GB, name=torch.cuda.get_device_name(world.device), memory=USABLE * memory)
    machine = estimate.Hardware(world.size // world.local_size, world.size, device)
    try:
        shape = read_shape(inputs.policy_folder)
    except UserError as unknown:
        choice = without_sizes(config, world.size, on_gpu, str(unknown))
    else:
        lengths, longest = inputs.lengths
        config = replace(config, model=replace(config.model, kernels="fused" if inputs.fused else "eager"))
        choice = choose(config, shape, lengths, machine, estimate.Packs.largest(config, lengths, longest, world.size))
    if choice.line and tells:
        terminal.say(choice.line)
    return choice.config


def open_models(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World,
                 terminal: Terminal) -> tuple[Policy, ReferenceEngine | None]:
    """The policy, and where the reference log-probs of `data_sets` come from (None for a loss without a reference)."""
    def policy() -> Policy:
        return make_policy(config, inputs.policy_folder, inputs.attention, world, inputs.fused)

    if not config.loss.needs_reference:
        return policy(), None
    if config.reference.is_policy:                       # it must be there first
        learner = policy()
        if config.reference.mode == "live":
            return learner, make_reference(config.reference, inputs.reference_setup(world, learner))
        return learner, CachedReference(fill_cache(config, inputs, data_sets, world, terminal, learner).cache)
    if config.reference.mode == "live":
        engine = _open_reference(config, inputs, data_sets, world, terminal)
        learner = policy()
        if config.reference.sync.mode == "none":
            return learner, engine
        assert isinstance(engine, HasWeights), "checked in config/rules.py"
        return learner, TrDpoReference(engine, learner, config.reference.sync, world)
    if config.reference.mode == "ahead":
        cache = LogpCache(config.reference.cache_dir, inputs.reference_key)
        open_cache(cache, world)
        scorer = Scorer(Path(config.scorer_dir), config.cluster.timeout_seconds)
        return policy(), AheadReference(cache, world, scorer, terminal.say)
    # the reference is freed before the policy is loaded
    scored = fill_cache(config, inputs, data_sets, world, terminal)
    return policy(), CachedReference(scored.cache)


def fill_cache(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World, terminal: Terminal,
               policy: Policy | None = None, windows: Indexes | None = None,
               progress: Callable[[], None] = lambda: None) -> Scored:
    """Scores what the cache does not hold of these pairs. The model is loaded only where something is missing.

    windows: training waits for these values, in this order (see scoring_order.py), so they reach the disk soon.
    `progress` is called at every pack.
    """
    cache = LogpCache(config.reference.cache_dir, inputs.reference_key)
    # servers lay out rows themselves
    padded = inputs.reference_attention == "padded" and not config.reference.outside
    scoring, damaged = plan_fill(cache, data_sets, world, config.train.tokens_per_microbatch, windows, padded)
    n_missing = len(scoring.sequences)
    if damaged:
        terminal.say(f"reference cache: {damaged} damaged shards set aside (*.corrupt in {cache.folder}); scored again")
    if n_missing:
        if config.reference.is_policy and policy is None:
            policy = make_policy(config, inputs.policy_folder, inputs.attention, world, inputs.fused)
        engine = _open_reference(config, inputs, data_sets, world, terminal, policy)
        with terminal.progress(n_missing, description="reference") as bar:
            def tell(done: int) -> None:
                bar.update(done)
                progress()

            fill(scoring, cache, data_sets, engine, world, tell, math.inf if windows is None else SECONDS_BEFORE_SHARED)
        engine.close()
    elif config.reference.outside:
        world.on_main(lambda: believe_earlier_audit(config, inputs.reference_key, inputs.dtype, terminal))
    return Scored(cache, n_missing, scoring.n_cached)


def _open_reference(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World, terminal: Terminal,
                    policy: Policy | None = None) -> ReferenceEngine:
    """The engine, whose values may be believed: one outside the training stack is audited first."""
    setup, reference = inputs.reference_setup(world, policy, config), config.reference
    engine = make_reference(reference, setup)
    if not isinstance(reference, OutsideConfig):
        return engine
    assert isinstance(engine, OutsideEngine)
    terminal.say(f"reference: {inputs.reference_key.recipe}, from {', '.join(engine.urls)}")
    audit(config, inputs.reference_key, inputs.dtype, list(engine.one_each()),
          lambda: make_reference(reference.oracle(), setup),
          data_sets, world, terminal)
    return engine
