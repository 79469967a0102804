"""RunConfig → the stages of a command: which entry point, on how many nodes, in how many processes, after what."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.words import quoted


@dataclass(frozen=True)
class Stage:
    """One entry point, started as `nodes` times `procs_per_node` processes, once the stages in `after` have succeeded.

    beside: the stage that this one serves: both start together, and this one ends with it at the latest.
    """

    name: str
    module: str
    nodes: int
    procs_per_node: int
    overrides: tuple[str, ...]
    after: tuple[str, ...] = ()
    beside: str | None = None
    run_dir: str = ""                         # where its logs and markers are; empty = the plan's run_dir
    devices: tuple[int, ...] | None = None    # of those that are visible on a machine; None = all
    server_nodes: int = 0                     # further nodes, with one of the reference's servers on each
    computes: bool = True                     # with a model, on devices; False: reads data, on one machine's processors

    @property
    def ranks(self) -> int:
        return self.nodes * self.procs_per_node


@dataclass(frozen=True)
class LaunchPlan:
    """What a command starts, in order, and the folder it leaves its results in."""

    run_dir: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class _Kind:
    module: str
    needed: Callable[[RunConfig], bool]       # by `run`
    after: tuple[str, ...] = ()               # the last of these that there is must have succeeded
    computes: bool = True
    alone: bool = False                       # one process, whatever the cluster's keys say


# `run` goes through those that the config needs, from top to bottom. Training also evaluates and exports, while the
# policy is in memory.
STAGES = {
    "audit": _Kind("dpo_dist.audit", lambda config: True, computes=False),
    "score": _Kind("dpo_dist.score", lambda config: config.scores_apart, after=("audit",)),
    "train": _Kind("dpo_dist.train", lambda config: True, after=("audit", "score")),
    "eval": _Kind("dpo_dist.evaluate", lambda config: False),
    "export": _Kind("dpo_dist.export", lambda config: False),
    "harness": _Kind("dpo_dist.harness", lambda config: bool(config.eval.harness.tasks), after=("train",), alone=True),
}


def plan_stages(verb: str, config: RunConfig, overrides: Sequence[str], devices: int = 1) -> LaunchPlan:
    """The stages of a verb: for `run` all that the config needs, else the verb's own. `devices`: processes a node where
    the config sets none."""
    if config.reference.mode == "ahead" and verb in ("run", "train", "score"):
        scoring, training = _side_by_side(config, tuple(overrides), devices)
        if verb != "run":
            return LaunchPlan(config.run_dir, (scoring,) if verb == "score" else (scoring, training))
        audit = _stage("audit", config, ["audit"], overrides, devices)
        last = [_stage(name, config, ["train"], overrides, devices) for name, kind in STAGES.items()
                if kind.alone and kind.needed(config)]
        return LaunchPlan(config.run_dir, (audit, replace(scoring, after=("audit",)),
                                           replace(training, after=("audit",)), *last))
    names = [name for name, kind in STAGES.items() if kind.needed(config)] if verb == "run" else [verb]
    return LaunchPlan(config.run_dir, tuple(_stage(name, config, names, overrides, devices) for name in names))


def _stage(name: str, config: RunConfig, names: Sequence[str], overrides: Sequence[str], devices: int) -> Stage:
    kind = STAGES[name]
    after = tuple(before for before in kind.after if before in names)[-1:]
    if not kind.computes:
        return Stage(name, kind.module, 1, 1, tuple(overrides), after, computes=False)
    if kind.alone:
        own = (*_one_node(config), "cluster.procs_per_node=1")
        return Stage(name, kind.module, 1, 1, (*overrides, *own), after)
    return Stage(name, kind.module, config.cluster.nodes, config.cluster.procs_per_node or devices, tuple(overrides),
                 after, server_nodes=_server_nodes(name, config))


def _one_node(config: RunConfig) -> list[str]:
    """The overrides of a stage that takes one, whatever the run takes."""
    return ["cluster.nodes=1", *(["cluster.min_nodes=null"] if config.cluster.submits else [])]


def _server_nodes(name: str, config: RunConfig) -> int:
    """Only the stage that scores holds nodes for servers: the others find the values in the cache."""
    scores = "train" if config.reference.mode == "live" else "score"
    return config.reference.server_nodes if name == scores else 0


def _side_by_side(config: RunConfig, overrides: tuple[str, ...], devices: int) -> tuple[Stage, Stage]:
    """reference.mode=ahead: (scoring, training), on devices of their own where a machine has several."""
    scorers = config.reference.procs or 1
    trainers = config.cluster.procs_per_node or max(1, devices - scorers)
    # jobs get devices of their own from Slurm; a CPU, or a single GPU, is shared
    shared = config.cluster.submits or devices == 1
    if not shared and trainers + scorers > devices:
        raise UserError(f"cluster.procs_per_node={trainers} and reference.procs={scorers} are more than this machine's "
                        f"{devices} devices; set cluster.procs_per_node={max(1, devices - scorers)}")
    folder = config.scorer_dir if re.fullmatch(r"[\w./+-]+", config.scorer_dir) else quoted(config.scorer_dir)
    own = [f"run.dir={folder}", *_one_node(config), f"cluster.procs_per_node={scorers}"]
    if config.zero.stage is None:
        own.append("zero.stage=0")                        # plain torch is for one process; scoring does not look at it
    scoring = Stage("score", STAGES["score"].module, 1, scorers, (*overrides, *own), beside="train",
                    run_dir=config.scorer_dir, devices=None if shared else tuple(range(trainers, trainers + scorers)),
                    server_nodes=_server_nodes("score", config))
    training = Stage("train", STAGES["train"].module, config.cluster.nodes, trainers, overrides,
                     devices=None if shared else tuple(range(trainers)))
    return scoring, training
