"""Guard: follows a run's rows as a tracker does, and keeps what it finds in <run.dir>/guard.jsonl, each guard once.

What it knows is told anew from metrics.jsonl and samples.jsonl when a run goes on: no checkpoint holds it. Rank 0
looks; all ranks act together at the end of a step (train_run.py), when `asks` says that there is something to tell.
"""
from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.loss_options import LOSS_OPTIONS
from dpo_dist.config.schema import GuardConfig, RunConfig
from dpo_dist.run.generations import samples_by_step
from dpo_dist.run.guard import (
    ROWS_AT_ONCE,
    ROWS_FOR_NOISE,
    Finding,
    Level,
    Name,
    displacement,
    growth,
    held_out_displacement,
    repeating,
    repetition,
)
from dpo_dist.run.inputs import Inputs
from dpo_dist.run.samples import Samples
from dpo_dist.run.tracking.metrics_file import keep_rows_until
from dpo_dist.runtime.json_lines import json_lines
from dpo_dist.runtime.run_dir import RunDir

ASKS = 0.25                              # less than the save timer's 0.5: one collective carries both
DRIFT = "reference/chosen_drift_per_token"
SHOWN_PAIRS = 5
ROWS_TO_START = 8                        # rows whose mean is the start, where policy and reference differ at once


@dataclass(frozen=True)
class Facts:
    """What the guard has to know of the run besides its rows."""

    same_start: bool                     # policy and reference: every drift is 0 before the first step
    held_out_tokens: float               # mean tokens of a held-out chosen answer
    prompts: tuple[str, ...] = ()        # where the held-out prompts of eval.samples stand


def make_guard(config: RunConfig, run_dir: RunDir, inputs: Inputs, samples: Samples, resumed_step: int) -> Guard:
    """The guard of a run that goes on after this step; 0 = from the start. Rank 0 calls it, once metrics.jsonl and
    samples.jsonl are cut to that step."""
    held_out = inputs.eval
    tokens = float(np.average(held_out.counted()[:, 0], weights=held_out.weight)) if len(held_out) else 1.0
    places = tuple(held_out[i].where for i in samples.pairs)
    return Guard(config, run_dir, Facts(inputs.same_start, tokens, places), resumed_step)


class Guard:
    """A Tracker beside the others: rows go in; `asks` and `tell` say what came of them."""

    def __init__(self, config: RunConfig, run_dir: RunDir, facts: Facts, resumed_step: int):
        self._config, self._path, self._facts = config, run_dir.guard, facts
        self._rows: deque[Level] = deque(maxlen=ROWS_AT_ONCE[-1] + ROWS_FOR_NOISE)
        self._first: Level | None = None                 # of the held-out pairs
        self._start = Level(0, 0.0, 0.0) if facts.same_start else None       # of the pairs trained on
        self._begun: list[Level] = []                    # its rows, where it has to be told from some
        self._before: Sequence[Mapping[str, Any]] = ()   # samples of the first evaluation
        self._waiting: list[tuple[Finding, list[str]]] = []
        keep_rows_until(self._path, resumed_step if resumed_step > 0 else -1)
        self.events = read_events(run_dir)
        self._silent = {event["guard"] for event in self.events}
        self._silent |= {name for name in get_args(Name) if action(config.guard, name) == "off"}
        self._replay(run_dir)

    def _replay(self, run_dir: RunDir) -> None:
        rows = [*run_dir.rows("eval"), *run_dir.rows("train")]
        for row in sorted(rows, key=lambda row: (row["step"], row["split"] == "eval")):
            self.log(row)
        for step, samples in samples_by_step(run_dir.samples).items():
            self.log_samples(step, samples)

    def log(self, row: Mapping[str, Any]) -> None:
        """Looks at a row of metrics, of training or of held-out pairs."""
        if "rewards/margins" not in row:                 # sft compares nothing
            return
        level = self._level(row)
        if level is None:
            return
        if row["split"] == "eval":
            self._first = self._first or level
            self._found(held_out_displacement(self._first, level))
        elif self._start is None:
            self._begun.append(level)
            if len(self._begun) == ROWS_TO_START:
                chosen, margin = (sum(values) / ROWS_TO_START for values in
                                  zip(*((one.chosen, one.margin) for one in self._begun), strict=True))
                self._start = Level(0, chosen, margin)
                self._rows.extend(Level(one.step, one.chosen - chosen, one.margin) for one in self._begun)
        else:
            self._rows.append(Level(level.step, level.chosen - self._start.chosen, level.margin))
            self._found(displacement(list(self._rows), self._start.margin))

    def _level(self, row: Mapping[str, Any]) -> Level | None:
        """Relative to the reference where that stands still; else the held-out pairs' own log-probs, as those of
        training are of other pairs each time."""
        step, margin, held_out = int(row["step"]), float(row["rewards/margins"]), row["split"] == "eval"
        if DRIFT in row and (not held_out or self._config.reference.sync.mode == "none"):
            return Level(step, float(row[DRIFT]), margin)
        if not held_out or "logps/chosen" not in row:
            return None
        return Level(step, float(row["logps/chosen"]) / self._facts.held_out_tokens, margin)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Looks at the answers of one evaluation."""
        self._before = self._before or rows
        before, now = ([int(row["tokens"]) for row in samples] for samples in (self._before, rows))
        if len(before) != len(now):                      # eval.samples has changed since
            return
        self._found(growth(step, before, now), self._most([b - a for a, b in zip(before, now, strict=True)]))
        if "repetition" not in self._silent:
            shares = [[repetition(row["completion"]) for row in samples] for samples in (self._before, rows)]
            self._found(repeating(step, *shares), self._most([b - a for a, b in zip(*shares, strict=True)]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing is open."""

    def _found(self, finding: Finding | None, pairs: list[str] | None = None) -> None:
        if finding is not None and finding.guard not in self._silent:
            self._silent.add(finding.guard)
            self._waiting.append((finding, pairs or []))

    def _most(self, more: Sequence[float]) -> list[str]:
        """Where the prompts stand whose answers changed most."""
        order = sorted(range(len(more)), key=lambda i: -more[i])
        return [self._facts.prompts[i] for i in order[:SHOWN_PAIRS] if i < len(self._facts.prompts)]

    # ------------------------------------------------------------------------------------------------ what comes of it

    def asks(self) -> float:
        """ASKS where something is to be told, else 0."""
        return ASKS if self._waiting else 0.0

    def tell(self, most_fallen: Callable[[Finding], Sequence[tuple[str, float]]]) -> tuple[list[str], list[str]]:
        """(messages of all that was found, the names of those that stop the run); each is kept in guard.jsonl.
        most_fallen: of a displacement, where the pairs stand whose chosen answer fell most, with nats a token."""
        waiting, self._waiting = self._waiting, []
        messages: list[str] = []
        stops: list[str] = []
        for finding, pairs in waiting:
            does = action(self._config.guard, finding.guard)
            of_pairs = finding.guard == "displacement"
            fallen = most_fallen(finding) if of_pairs else []
            where = [place for place, _ in fallen] if of_pairs else pairs
            shown = "; ".join(f"{place} ({value:+.2f})" for place, value in fallen) if of_pairs else "; ".join(pairs)
            message = (f"step {finding.step}: {finding.what}."
                       + (f" {'Most fallen pairs' if of_pairs else 'Most changed prompts'}: {shown}." if shown else "")
                       + f" Remedy: {remedy(self._config, finding.guard)}")
            self._keep({"step": finding.step, "guard": finding.guard, "action": does, "message": message,
                        "value": finding.value, "bound": finding.bound, "pairs": where})
            messages.append(f"guard.on_{finding.guard}={does}: {message}")
            stops += [finding.guard] if does == "stop" else []
        return messages, stops

    def _keep(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """The rows of guard.jsonl; none where there is no file."""
    return [row for row in json_lines(run_dir.guard, {"step": (int,), "guard": (str,), "message": (str,)})
            if row["guard"] in get_args(Name)]


def action(guard: GuardConfig, name: str) -> str:
    """off, warn or stop."""
    return str(getattr(guard, f"on_{name}"))


def check_not_stopped(run_dir: RunDir, guard: GuardConfig, resumed_step: int) -> None:
    """UserError where a guard that is to stop the run has spoken in what is kept of it."""
    for event in read_events(run_dir):
        if event["step"] <= resumed_step and action(guard, event["guard"]) == "stop":
            raise UserError(f"guard.on_{event['guard']}=stop: {event['message']}. {how_to_go_on([event['guard']])}")


def how_to_go_on(names: Sequence[str]) -> str:
    """What a person does after a stop."""
    keys = " ".join(f"guard.on_{name}=warn" for name in names)
    return (f"Go on from the last checkpoint with {keys}; the same command stops again at once. Or start anew with the "
            "remedy")


def remedy(config: RunConfig, name: str) -> str:
    """What a person can change, with the values that stand now."""
    lr = f"lower optim.lr (now {config.optim.lr:g})"
    beta = [] if config.loss.beta is None else [f"a larger loss.beta (now {config.loss.beta:g})"]
    if name == "displacement":
        has_sft = {"sft", "orpo", "cpo"} & set(config.loss.weights)
        terms = ["more weight of sft in loss.terms" if "sft" in has_sft else "loss=rpo, or another mixture with sft"]
        norm = ["loss=sigmoid_norm"] if "sigmoid_norm" not in config.loss.weights and _is_relative(config) else []
        return ", ".join([lr, *([] if has_sft == {"orpo"} else terms), *norm, *beta])
    if name == "length":
        norm = ["loss=sigmoid_norm or loss.ld_alpha=0.5, which count long answers less"] if _is_relative(config) else []
        return ", ".join([*norm, lr, *beta, "chosen answers that are not longer than the rejected ones"])
    return ", ".join([lr, *beta, "fewer steps (train.keep_best=rewards/accuracies)"])


def _is_relative(config: RunConfig) -> bool:
    return all(LOSS_OPTIONS[name].needs_reference or name == "sft" for name in config.loss.weights)
