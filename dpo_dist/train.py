"""The training run, top to bottom. Also what torchrun is pointed at: torchrun --nproc-per-node 8 -m dpo_dist.train [overrides]."""
from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist import stop
from dpo_dist.checkpoint import Kept, TrainState, resume_point, save_checkpoint
from dpo_dist.config import RunConfig, UserError
from dpo_dist.data.order import order_of
from dpo_dist.engines import open_engines
from dpo_dist.entry import exit_with, run_entry
from dpo_dist.evaluate import evaluate_run
from dpo_dist.export import export_model
from dpo_dist.gate import check_step_0
from dpo_dist.inputs import read_inputs
from dpo_dist.metrics import MetricSums
from dpo_dist.passport import add_parity, begin_run, passport
from dpo_dist.perf import Clock, known_peak_tflops
from dpo_dist.schedule import learning_rate
from dpo_dist.step import StepBatches, step_batches, train_step
from dpo_dist.terminal import Terminal
from dpo_dist.tracking import open_tracker
from dpo_dist.world import World


def train(config: RunConfig, world: World, terminal: Terminal) -> None:
    stop.listen()
    run_dir, t, loss = Path(config.run_dir), config.train, config.loss
    inputs = read_inputs(config, world, terminal)
    if not len(inputs.train):
        raise UserError("data.train leaves no pairs to train on; see the counts above")
    lineage = passport(config, inputs, world)
    world.on_main(lambda: begin_run(run_dir, config, lineage))

    order = order_of(inputs.train, t, config.data.group_by_prompt)
    total = order.total_steps(t.epochs, t.max_steps)
    resumed = world.on_main(lambda: resume_point(run_dir, config.zero.stage, world.size))
    done = resumed[1].step if resumed else 0
    if done == total and world.on_main(lambda: (run_dir / "model").exists()):
        terminal.say(f"nothing to do: all {total} steps are done, the model is in {run_dir}/model")
        return

    policy, reference = open_engines(config, inputs, [inputs.train, inputs.eval], world, terminal)
    if config.reference.audit is not None:
        world.on_main(lambda: add_parity(run_dir))
    kept: list[Kept] = [policy] if reference is None else [policy, reference]
    if resumed:
        for each in kept:
            each.load(resumed[0])
        terminal.say(f"resumed from {resumed[0].name}")
    tracker = open_tracker(config, run_dir, world.is_main, done)

    flops = inputs.flops.training(frozen_base=config.model.lora.rank > 0)

    def batches(step: int) -> StepBatches:
        pair_ids = order.pairs_of_step(step, t.epochs, t.max_steps)
        return step_batches(inputs.train, pair_ids, loss, world, t.tokens_per_microbatch, flops)

    def held_out(step: int) -> dict[str, float]:
        means = evaluate_run(config, inputs, policy, reference, world)
        if means:
            tracker.log({"step": step, "split": "eval", **means})
        return means

    def save(step: int) -> None:
        save_checkpoint(run_dir, kept, TrainState(step, config.zero.stage, world.size), t.keep_checkpoints, world)

    before: dict[str, float] = {}
    if done == 0:
        same = reference if inputs.same_start else None
        check_step_0(policy, same, batches(1), order.pairs_of_step(1, t.epochs, t.max_steps), inputs.train, inputs.dtype, world)
        before = held_out(0)
    after = before if done < total else evaluate_run(config, inputs, policy, reference, world)

    peak = config.cluster.peak_tflops or known_peak_tflops(world.device, inputs.dtype)
    clock, sums = Clock(world, peak), MetricSums(loss, world.device)
    with terminal.progress(total, done, "training") as bar, ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batches, min(done + 1, total))             # the next step is packed while this one computes
        for step in range(done + 1, total + 1):
            now, coming = coming.result(), ahead.submit(batches, min(step + 1, total))
            clock.mark("data")
            try:
                part = train_step(policy, reference, now, loss, sums, world, clock)
            except (stop.Stopped, UserError):            # all ranks, before anything of the step was done: the reference's values do not come
                if step - 1 > done:
                    save(step - 1)
                raise
            told = world.max(stop.asked() if math.isfinite(part.item()) else math.inf)
            if told == math.inf:
                raise FloatingPointError(f"the loss of step {step} is not finite; no weight was changed. Lower optim.lr, or look at the data")
            clock.mark("wait")
            lr = learning_rate(config.optim, step, total)
            grad_norm = policy.step(lr)
            if not math.isfinite(grad_norm):             # the same on every rank
                raise FloatingPointError(f"the gradient of step {step} is not finite; the last checkpoint is from before. Lower optim.lr")
            if reference is not None:
                reference.after_step(step)
            clock.mark("step")
            clock.count(now.work)

            if step % t.log_every_steps == 0 or step == total:
                row = {**sums.means(world), "grad_norm": grad_norm, "lr": lr, **clock.read()}
                tracker.log({"step": step, "split": "train", **row})
                bar.update(step, loss=row["loss"], accuracy=row.get("rewards/accuracies"), pairs_per_second=row["perf/pairs_per_second"])
                sums = MetricSums(loss, world.device)
            if step == total or (t.eval_every_steps and step % t.eval_every_steps == 0):
                after = held_out(step)
            if step == total or told or (t.save_every_steps and step % t.save_every_steps == 0):
                save(step)
            if told:
                tracker.finish({})
                raise stop.Stopped(told, f"step {step} of {total} is saved")
            clock.mark(None)                             # evaluation and saving are not training time

    model = export_model(run_dir, policy, inputs, config, after, world)
    tracker.finish(after)
    if reference is not None:
        reference.close()
    if after:
        rows = [[name, f"{before[name]:.4f}" if name in before else "-", f"{value:.4f}"] for name, value in after.items()]
        terminal.table(f"held-out pairs: {len(inputs.eval)}", ["metric", "before", "after"], rows)
    terminal.say(f"model: {model}\nmetrics: {run_dir}/metrics.jsonl\nlogs: {run_dir}/logs")


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], train, owns_run=True))
