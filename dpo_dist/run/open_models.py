"""The models of a run, opened in an order that never holds the reference and the policy at once without need."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dpo_dist.config.errors import UserError
from dpo_dist.config.reference import OutsideConfig
from dpo_dist.config.schema import RunConfig, with_keys
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
from dpo_dist.run.checkpoint import TrainState
from dpo_dist.run.inputs import Inputs
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.sizing.automatic import choose, is_automatic, without_sizes
from dpo_dist.sizing.hardware import CPU, GPU_80GB, Hardware
from dpo_dist.sizing.lengths import Packs
from dpo_dist.sizing.one_process import one_process_line
from dpo_dist.sizing.shape import read_shape

# share of a GPU's memory that predictions may fill: predictions err, and memory fragments
USABLE = 0.9
# scores for a waiting training are written at least this often (at the beginning every second)
SECONDS_BEFORE_SHARED = 30.0


def without_auto(config: RunConfig, inputs: Inputs, saved: TrainState | None, world: World,
                 terminal: Terminal) -> RunConfig:
    """The config with zero.stage and model.gradient_checkpointing chosen where they are `auto`, the same on every rank.
    A run that goes on with as many ranks keeps its stage. All ranks call it."""
    if not is_automatic(config):
        return config
    on_gpu, stage_is_auto = world.device.type == "cuda", config.zero.stage == "auto"
    if stage_is_auto and saved is not None and saved.ranks == world.size:
        config = with_keys(config, {"zero.stage": saved.zero_stage})
    device = CPU
    if on_gpu:
        memory = -world.max(-float(torch.cuda.get_device_properties(world.device).total_memory))
        device = replace(GPU_80GB, name=torch.cuda.get_device_name(world.device), memory=USABLE * memory)
    machine = Hardware(world.size // world.local_size, world.size, device)
    try:
        shape = read_shape(inputs.policy.base, inputs.policy.adapter)
    except UserError as unknown:
        choice = without_sizes(config, world.size, on_gpu, str(unknown))
    else:
        lengths, longest = inputs.lengths
        config = replace(config, model=replace(config.model, kernels="fused" if inputs.fused else "eager"))
        choice = choose(config, shape, lengths, machine, Packs.largest(config, lengths, longest, world.size))
    if choice.line and (on_gpu or stage_is_auto):
        terminal.say(choice.line)
    return choice.config


def tell_faster(config: RunConfig, inputs: Inputs, world: World, terminal: Terminal) -> None:
    """One line where this machine's CPU would train faster in one process. The stage is chosen already."""
    if world.device.type != "cpu" or world.size == 1:
        return
    try:
        shape = read_shape(inputs.policy.base, inputs.policy.adapter)
    except UserError:
        return                                                   # sizes are not known, and it is only advice
    machine = Hardware(world.size // world.local_size, world.size, CPU)
    if line := one_process_line(config, shape, inputs.lengths[0], machine):
        terminal.say(f"faster: {line}")


def open_models(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World,
                 terminal: Terminal) -> tuple[Policy, ReferenceEngine | None]:
    """The policy, and where the reference log-probs of `data_sets` come from (None for a loss without a reference)."""
    if not config.loss.needs_reference:
        return open_policy(config, inputs, world), None
    # the policy is loaded first only where it is the reference; a reference that fills the cache is freed before that
    policy = open_policy(config, inputs, world) if config.reference.is_policy else None
    if config.reference.mode == "live":
        engine = _open_reference(config, inputs, data_sets, world, terminal, policy)
        policy = policy or open_policy(config, inputs, world)
        if config.reference.sync.mode == "none":
            return policy, engine
        assert isinstance(engine, HasWeights), "checked in config/rules.py"
        return policy, TrDpoReference(engine, policy, config.reference.sync, world)
    if config.reference.mode == "ahead":
        cache = LogpCache(config.reference.cache_dir, inputs.reference_key)
        open_cache(cache, world)
        scorer = Scorer(Path(config.scorer_dir), config.cluster.timeout_seconds)
        return open_policy(config, inputs, world), AheadReference(cache, world, scorer, terminal.say)
    cache, _ = fill_cache(config, inputs, data_sets, world, terminal, policy)
    return policy or open_policy(config, inputs, world), CachedReference(cache)


def scores_at_hand(config: RunConfig, inputs: Inputs, policy: Policy,
                   reference: ReferenceEngine | None) -> ReferenceEngine | None:
    """The reference as it scores sequences that no data set has, without a further model in memory: a live one, or one
    that is the policy itself. None where there is none."""
    if reference is None or reference.at_temperature(1.0) is not None:
        return reference
    return open_scorer(config, inputs, policy) if config.reference.is_policy else None


def open_scorer(config: RunConfig, inputs: Inputs, policy: Policy) -> ReferenceEngine | None:
    """The reference opened live, beside the policy, to score sequences that no data set has; None where it is outside
    the training stack, or the loss has none."""
    if not config.loss.needs_reference or config.reference.outside:
        return None
    return make_reference(config.reference, replace(inputs.reference_setup, policy=policy, run=config,
                                                    key=inputs.reference_key))


def open_policy(config: RunConfig, inputs: Inputs, world: World) -> Policy:
    """The policy with its starting weights; beside them the reference's adapter, where the engine wants it there."""
    beside = inputs.reference_setup.folder.adapter if config.reference.adapter_beside else None
    return make_policy(config, inputs.policy, inputs.attention, world, inputs.fused, beside)


def fill_cache(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World, terminal: Terminal,
               policy: Policy | None = None, windows: Indexes | None = None,
               progress: Callable[[], None] = lambda: None) -> tuple[LogpCache, str]:
    """(the cache, which holds every pair now; how many sequences were computed and how many found there, for a person).
    The model is loaded only where something is missing.

    windows: training waits for these values, in this order (see scoring_order.py), so they reach the disk soon.
    `progress` is called at every pack.
    """
    cache = LogpCache(config.reference.cache_dir, inputs.reference_key)
    # servers lay out rows themselves
    padded = inputs.reference_setup.attention == "padded" and not config.reference.outside
    scoring, damaged = plan_fill(cache, data_sets, world, config.train.tokens_per_microbatch, windows, padded)
    n_missing = len(scoring.sequences)
    if damaged:
        terminal.say(f"reference cache: {damaged} damaged shards set aside (*.corrupt in {cache.folder}); scored again")
    if n_missing:
        if config.reference.is_policy and policy is None:
            policy = open_policy(config, inputs, world)
        engine = _open_reference(config, inputs, data_sets, world, terminal, policy)
        with terminal.progress(n_missing, description="reference") as bar:
            def tell(done: int) -> None:
                bar.update(done)
                progress()

            fill(scoring, cache, data_sets, engine, world, tell, math.inf if windows is None else SECONDS_BEFORE_SHARED)
        engine.close()
    elif config.reference.outside:
        world.on_main(lambda: believe_earlier_audit(config, inputs.reference_key, inputs.dtype, terminal))
    return cache, f"scored {n_missing}, cached {scoring.n_cached}"


def _open_reference(config: RunConfig, inputs: Inputs, data_sets: Sequence[PairStore], world: World, terminal: Terminal,
                    policy: Policy | None = None) -> ReferenceEngine:
    """The reference's engine; one outside the training stack is audited before its values are used."""
    reference = config.reference
    setup = replace(inputs.reference_setup, policy=policy, run=config, key=inputs.reference_key)
    engine = make_reference(reference, setup)
    if not isinstance(reference, OutsideConfig):
        return engine
    assert isinstance(engine, OutsideEngine)
    terminal.say(f"reference: {inputs.reference_key.recipe}, from {', '.join(engine.urls)}")
    audit(config, inputs.reference_key, inputs.dtype, list(engine.one_each()),
          lambda: make_reference(reference.oracle(), setup),
          data_sets, world, terminal)
    return engine
