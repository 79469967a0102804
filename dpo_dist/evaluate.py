"""Held-out evaluation: the loss and the rewards over pairs that are not trained on. Also `dpo-dist eval`."""
from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.losses import preference_loss
from dpo_dist.policy import Policy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.run.inputs import Inputs, read_inputs
from dpo_dist.run.judging import check_judge, judge_samples
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.open_models import open_models, without_auto
from dpo_dist.run.samples import Samples, show_samples
from dpo_dist.runtime import preemption
from dpo_dist.runtime.files import write_atomic, write_json
from dpo_dist.runtime.process import exit_with, run_entry
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import forward_pairs, gather_pairs, step_batches

PAIRS_AT_ONCE = 1024                     # planned together; the result does not depend on it


def evaluate(config: RunConfig, inputs: Inputs, policy: Policy, reference: ReferenceEngine | None,
             world: World) -> dict[str, float]:
    """{metric: mean over all held-out pairs}; empty where there are none. All ranks call it; each forwards its share.
    Stopped if a signal has come."""
    pairs, loss = inputs.eval, config.loss
    if not len(pairs):
        return {}
    sums = MetricSums(loss, world.device)
    weights = np.asarray(pairs.weight, dtype=np.float64)
    mean_chosen_tokens = float(np.average(pairs.counted()[:, 0], weights=weights))
    found, positions = [], []
    with policy.evaluating():
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            if signal := world.max(preemption.received()):
                raise preemption.Stopped(signal, "the evaluation is made again")
            ids = np.arange(start, min(start + PAIRS_AT_ONCE, len(pairs)))
            part = step_batches(pairs, ids, loss, world, config.train.tokens_per_microbatch, inputs.flops, reference)
            if reference is not None:
                reference.wait_for(part.batches)
            for batch, at in zip(part.batches, part.positions, strict=True):
                logps, weight = forward_pairs(policy, reference, batch, loss, mean_chosen_tokens, world.device)
                if loss.needs_whole_step:
                    found.append(logps)
                    positions.append([start + i for i in at])
                else:
                    sums.add(logps, preference_loss(logps, loss), weight)
    if loss.needs_whole_step:            # a sort over all pairs: rank 0 holds them all, and counts them once
        whole = gather_pairs(found, positions, mean_chosen_tokens, world)
        if world.is_main:
            sums = MetricSums(loss, whole.policy_chosen.device)
            sums.add(whole, preference_loss(whole, loss), whole.policy_chosen.new_ones(len(pairs)))
    return sums.means(world)


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
    config = without_auto(config, inputs, world, terminal)
    policy, reference = open_models(config, inputs, [inputs.eval], world, terminal)
    means = evaluate(config, inputs, policy, reference, world)
    samples = Samples.of(config, inputs)
    answers = samples.answer(policy, 0, world) if samples.prompts else []
    run_dir = RunDir(config.run_dir)
    if world.is_main:
        path = run_dir.eval_json
        write_json(path, {"model": config.model.path, "pairs": len(inputs.eval), **means})
        rows = [[name, f"{value:.4f}"] for name, value in means.items()]
        terminal.table(f"{config.model.path}: {len(inputs.eval)} held-out pairs", ["metric", "mean"], rows)
        terminal.say(f"written to {path}")
        if answers:
            write_atomic(run_dir.samples, "".join(json.dumps(row) + "\n" for row in answers))
            show_samples(terminal, run_dir, {"answer": 0})
    if config.eval.judge.is_asked:
        world.on_main(lambda: judge_samples(config, run_dir, answers, samples.chosen(inputs.eval), terminal))


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], _eval_command))
