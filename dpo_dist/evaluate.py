"""Held-out evaluation: the loss and the rewards over pairs that are not trained on. Also `dpo-dist eval`."""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LossConfig, RunConfig
from dpo_dist.data.store import PairStore
from dpo_dist.evaluation.facts import Facts
from dpo_dist.evaluation.pairs import EvaluatedPairs
from dpo_dist.evaluation.results import keep_evaluation
from dpo_dist.evaluation.sampled_kl import sampled_kl
from dpo_dist.evaluation.show import summary_lines
from dpo_dist.evaluation.summary import Summary
from dpo_dist.losses import preference_logit, preference_loss, rewards
from dpo_dist.policy import Policy
from dpo_dist.policy.generate import Ids
from dpo_dist.reference import ReferenceEngine
from dpo_dist.run.inputs import Inputs, read_inputs
from dpo_dist.run.judging import check_judge, judge_samples
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.open_models import open_models, open_scorer, scores_at_hand, without_auto
from dpo_dist.run.samples import Samples, show_samples
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.files import write_atomic, write_json
from dpo_dist.runtime.process import run_entry
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import forward_pairs, gather_pairs, step_batches
from dpo_dist.types import PairLogps

PAIRS_AT_ONCE = 1024                     # planned together; the result does not depend on it
PACKS_BETWEEN_AGREEMENTS = 4             # to stop: a few seconds of a large model
MEASURED = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "reward_chosen",
            "reward_rejected", "logit", "loss")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Without held-out pairs there are no means."""

    means: dict[str, float]                  # {metric: mean over all held-out pairs}
    pairs: EvaluatedPairs | None             # on rank 0, where there are pairs


def evaluate(config: RunConfig, inputs: Inputs, policy: Policy, reference: ReferenceEngine | None,
             world: World) -> Evaluation:
    """All held-out pairs, measured. All ranks call it; each forwards its share. Stopped if a signal has come."""
    pairs, loss = inputs.eval, config.loss
    if not len(pairs):
        return Evaluation({}, None)
    sums, rows = MetricSums(loss, world.device), PairRows(loss)
    weights = np.asarray(pairs.weight, dtype=np.float64)
    mean_chosen_tokens = float(np.average(pairs.counted()[:, 0], weights=weights))
    found, positions = [], []
    with policy.evaluating():
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            ids = np.arange(start, min(start + PAIRS_AT_ONCE, len(pairs)))
            part = step_batches(pairs, ids, loss, world, config.train.tokens_per_microbatch, inputs.flops, reference)
            if reference is not None:
                reference.wait_for(part.batches)
            for i, (batch, at) in enumerate(zip(part.batches, part.positions, strict=True)):
                if i % PACKS_BETWEEN_AGREEMENTS == 0:    # all ranks have as many packs
                    world.heed_signals("the evaluation is made again")
                logps, weight = forward_pairs(policy, reference, batch, loss, mean_chosen_tokens, world.device)
                here = [start + i for i in at]
                if loss.needs_whole_step:
                    found.append(logps)
                    positions.append(here)
                else:
                    per_pair = preference_loss(logps, loss)
                    sums.add(logps, per_pair, weight)
                    rows.add(here, logps, per_pair)
    if loss.needs_whole_step:            # a sort over all pairs: rank 0 holds them all, and counts them once
        whole = gather_pairs(found, positions, mean_chosen_tokens, world)
        if world.is_main:
            sums, per_pair = MetricSums(loss, whole.policy_chosen.device), preference_loss(whole, loss)
            sums.add(whole, per_pair, whole.policy_chosen.new_ones(len(pairs)))
            rows.add(range(len(pairs)), whole, per_pair)
    return Evaluation(sums.means(world), rows.gathered(pairs, world))


class PairRows:
    """What this rank's packs say of each pair; on the device until the end, so that adding never waits for it."""

    def __init__(self, loss: LossConfig):
        self._loss = loss
        self._rows: list[Tensor] = []
        self._positions: list[int] = []

    def add(self, positions: Sequence[int], pairs: PairLogps, per_pair_loss: Tensor) -> None:
        """positions: of the pack's pairs in the store; empty for a filler, of which nothing is kept."""
        if not positions:
            return
        unknown = torch.full_like(pairs.policy_chosen, float("nan"))
        reward = rewards(pairs, self._loss)
        chosen, rejected = (unknown, unknown) if reward is None else reward
        references = (unknown if value is None else value
                      for value in (pairs.reference_chosen, pairs.reference_rejected))
        logit = preference_logit(pairs, self._loss)
        self._rows.append(torch.stack([pairs.policy_chosen, pairs.policy_rejected, *references, chosen, rejected,
                                       unknown if logit is None else logit, per_pair_loss]).detach().double())
        self._positions += positions

    def gathered(self, pairs: PairStore, world: World) -> EvaluatedPairs | None:
        """All ranks' pairs in the order of the store, on rank 0; None elsewhere. All ranks call it."""
        mine = torch.cat(self._rows, 1).cpu().numpy() if self._rows else np.empty((len(MEASURED), 0))
        parts = world.gather((np.array(self._positions, dtype=np.int64), mine))
        if not world.is_main:
            return None
        order = np.argsort(np.concatenate([at for at, _ in parts]), kind="stable")
        values = np.concatenate([rows for _, rows in parts], 1)[:, order]
        assert values.shape[1] == len(pairs), "each pair is measured once"
        if not self._loss.uses_rejected:                 # its forward stood in for a chosen one's
            values[[MEASURED.index("policy_rejected"), MEASURED.index("reference_rejected")]] = float("nan")
        tokens = pairs.counted()
        return EvaluatedPairs(pair=np.arange(len(pairs), dtype=np.int32), chosen_tokens=tokens[:, 0],
                              rejected_tokens=tokens[:, 1], weight=np.asarray(pairs.weight, dtype=np.float64),
                              **dict(zip(MEASURED, values, strict=True)))


def _eval_command(config: RunConfig, world: World, terminal: Terminal) -> None:
    """Evaluates model.path against the reference on data.eval, and writes <run.dir>/eval.json."""
    inputs = read_inputs(config, world, terminal)
    if not len(inputs.eval):
        raise UserError("data.eval=[] and data.eval_fraction=0 leave no held-out pairs; set data.eval=[{path: "
                        "held_out.jsonl}]")
    if config.eval.judge.is_asked and config.eval.judge.against == "before":
        raise UserError("eval.judge.against=before compares with answers from before training, and eval trains "
                        "nothing; set eval.judge.against=chosen")
    world.on_main(lambda: check_judge(config.eval.judge))
    if config.reference.mode == "ahead":                  # a mode of training: nothing else scores now
        config = replace(config, reference=replace(config.reference, mode="cached"))
    config = without_auto(config, inputs, None, world, terminal)
    policy, reference = open_models(config, inputs, [inputs.eval], world, terminal)
    found = evaluate(config, inputs, policy, reference, world)
    means = found.means
    samples = Samples.of(config, inputs)
    completions = samples.complete(policy, 0, world) if samples.prompts else []
    answers = samples.rows(0, completions) if completions else []
    kl = _kl(config, inputs, policy, reference, samples, completions, world)
    run_dir = RunDir(config.run_dir)
    if world.is_main:
        path = run_dir.eval_json
        write_json(path, {"model": config.model.path, "pairs": len(inputs.eval), **means})
        rows = [[name, f"{value:.4f}"] for name, value in means.items()]
        terminal.table(f"{config.model.path}: {len(inputs.eval)} held-out pairs", ["metric", "mean"], rows)
        assert found.pairs is not None, "rank 0 has them"
        run_dir = _own_folder(run_dir)
        summary = keep_evaluation(run_dir, 0, found.pairs, Facts.of(inputs.eval), config.loss, kl=kl)
        terminal.say("\n".join([*summary_lines(summary), f"written to {path} and {run_dir.evaluation_json}"]))
        if answers:
            write_atomic(run_dir.samples, "".join(json.dumps(row) + "\n" for row in answers))
            show_samples(terminal, run_dir, {"answer": 0})
    if config.eval.judge.is_asked:
        world.on_main(lambda: judge_samples(config, run_dir, answers, samples.chosen(inputs.eval), terminal))


def _kl(config: RunConfig, inputs: Inputs, policy: Policy, reference: ReferenceEngine | None, samples: Samples,
        completions: Sequence[Ids], world: World) -> Summary | None:
    """As sampled_kl. Where the reference's values came from the cache, it is opened for that."""
    if not completions or samples.how.temperature == 0:
        return None
    scorer = scores_at_hand(config, inputs, policy, reference)
    opened = None if scorer is not None else open_scorer(config, inputs, policy)
    found = sampled_kl(policy, scorer or opened, samples.prompts, completions, samples.how, inputs.pads, world)
    if opened is not None:
        opened.close()
    return found


def _own_folder(run_dir: RunDir) -> RunDir:
    """Where `dpo-dist eval` keeps what it found of each pair. In a training run's folder, whose own evaluations must
    stay, that is <run.dir>/eval."""
    return RunDir(run_dir.path / "eval") if run_dir.run_json.exists() else run_dir


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], _eval_command))
