"""The module of a run's optimizer, named as in `optim.name`: it is imported here alone."""
from __future__ import annotations

from importlib import import_module
from types import ModuleType

from dpo_dist.config.schema import OptimConfig


def optimizer_module(optim: OptimConfig) -> ModuleType:
    """The module whose `make_optimizer(optim, weights)` makes the optimizer; its learning rate is set at each step
    (skip.py). UserError where a library that it needs is missing.
    """
    return import_module(f"dpo_dist.policy.optimizers.{optim.name}")
