"""RunConfig → the ReferenceEngine that it asks for. Only this imports an engine's module, which may be slow to
import."""
from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from dpo_dist.config.reference import ReferenceConfig
from dpo_dist.config.schema import RunConfig
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.adapter_off import HasAdapters
from dpo_dist.reference.cache.store import PLAIN_RECIPE, ReferenceKey
from dpo_dist.runtime.world import World


@dataclass(frozen=True)
class Setup:
    """What an engine is opened with, besides its keys."""

    folder: ModelFolder                    # the frozen weights
    dtype: torch.dtype
    attention: str                         # branch or padded
    world: World
    policy: HasAdapters | None = None      # for an engine that is the policy
    fused: bool = False                    # as in load_causal_lm
    quantization: str = "none"             # as in load_causal_lm
    # for an engine outside the training stack: what it serves, and under which key
    run: RunConfig | None = None
    key: ReferenceKey | None = None

    def fused_for(self, config: ReferenceConfig) -> bool:
        return self.fused and config.may_fuse


def make_reference(config: ReferenceConfig, setup: Setup) -> ReferenceEngine:
    """The engine, by `open_engine` of the module that has its name."""
    return _module(config).open_engine(config, setup)


def reference_key(config: ReferenceConfig, weights: str, setup: Setup, quantized: str | None) -> ReferenceKey:
    """The key of the cache's values. Engines of the training stack give the same values and share a key, unless
    quantized weights or rounded partial sums change them. An engine outside has a key of its own."""
    dtype, rounds = str(setup.dtype).removeprefix("torch."), setup.dtype != torch.float32
    if config.outside:
        return _module(config).reference_key(config, weights, dtype)
    parts = [PLAIN_RECIPE, *([quantized] if quantized else [])]
    if rounds and setup.fused_for(config):
        parts.append("fused kernels")                    # which round once where the model's own code rounds often
    return ReferenceKey(weights, dtype, ", ".join([*parts, *config.recipe(rounds, setup.world.local_size)]))


def _module(config: ReferenceConfig) -> Any:
    return import_module(f"dpo_dist.reference.{config.engine}")
