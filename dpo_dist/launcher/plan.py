"""RunConfig → the stages of a command: which entry point runs, in how many processes. Pure."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_dist.config import RunConfig


@dataclass(frozen=True)
class Stage:
    """One entry point, started as `processes` processes with these overrides."""

    name: str
    module: str
    processes: int
    overrides: tuple[str, ...]


MODULES = {"score": "dpo_dist.score", "train": "dpo_dist.train", "eval": "dpo_dist.evaluate", "export": "dpo_dist.export"}


def plan(verb: str, config: RunConfig, overrides: Sequence[str], devices: int) -> tuple[Stage, ...]:
    """The stages of a verb. `run` scores in processes of their own, so that the trainer never shares memory with the reference;
    the training stage then evaluates and exports while the policy is in memory."""
    names = [verb] if verb != "run" else (["score"] if _scores_apart(config) else []) + ["train"]
    processes = config.cluster.procs_per_node or devices
    return tuple(Stage(name, MODULES[name], processes, tuple(overrides)) for name in names)


def _scores_apart(config: RunConfig) -> bool:
    return config.loss.needs_reference and config.reference.mode == "cached" and config.reference.engine != "adapter_off"
