"""The training run, top to bottom. Also what torchrun is pointed at: torchrun --nproc-per-node 8 -m dpo_dist.train [overrides]."""
from __future__ import annotations

import sys
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import make_sampler
from dpo_dist.evaluate import evaluate_run
from dpo_dist.export import export_model
from dpo_dist.reference.audit import believe_earlier_audit
from dpo_dist.run.checkpoint import Kept, TrainState, resume_point, save_checkpoint
from dpo_dist.run.inputs import read_inputs
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.open_models import open_models, without_auto
from dpo_dist.run.perf import Clock, known_peak_tflops
from dpo_dist.run.provenance import add_parity, check_same_run, passport, write_run
from dpo_dist.run.schedule import learning_rate
from dpo_dist.run.step_results import StepLog, StepResults
from dpo_dist.run.tracking.make import open_tracker
from dpo_dist.run.tracking.metrics_file import last_step
from dpo_dist.runtime import preemption
from dpo_dist.runtime.process import exit_with, run_entry
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import PackedAhead, StepBatches, step_batches, train_step
from dpo_dist.step0_checks import check_step_0


def train(config: RunConfig, world: World, terminal: Terminal) -> None:
    preemption.listen()
    run_dir, t, loss = Path(config.run_dir), config.train, config.loss
    inputs = read_inputs(config, world, terminal)
    if not len(inputs.train):
        raise UserError("data.train leaves no pairs to train on; see the counts above")
    config = without_auto(config, inputs, world, terminal)
    lineage = passport(config, inputs, world)
    world.on_main(lambda: check_same_run(run_dir, config, lineage))

    order = make_sampler(inputs.train, t, config.data.group_by_prompt)
    total = order.total_steps(t.epochs, t.max_steps)
    resumed = world.on_main(lambda: resume_point(run_dir, config.zero.chosen_stage, world.size))
    done = resumed[1].step if resumed else 0
    if done == total and world.on_main(lambda: (run_dir / "model").exists()):
        terminal.say(f"nothing to do: all {total} steps are done, the model is in {run_dir}/model")
        return
    world.on_main(lambda: write_run(run_dir, config, lineage))

    policy, reference = open_models(config, inputs, [inputs.train, inputs.eval], world, terminal)
    kept: list[Kept] = [policy] if reference is None else [policy, reference]
    if resumed:
        for each in kept:
            each.load(resumed[0])
        terminal.say(f"resumed from {resumed[0].name}")
    tracker = open_tracker(config, run_dir, world.is_main, done)

    flops = inputs.flops.training(frozen_base=config.model.lora.rank > 0)

    def batches(step: int) -> StepBatches:
        pair_ids = order.pairs_of_step(step, t.epochs, t.max_steps)
        return step_batches(inputs.train, pair_ids, loss, world, t.tokens_per_microbatch, flops, reference)

    def held_out(step: int) -> dict[str, float]:
        means = evaluate_run(config, inputs, policy, reference, world)
        if means:
            tracker.log({"step": step, "split": "eval", **means})
        return means

    def save(step: int, sums: MetricSums) -> None:
        state = TrainState(step, config.zero.chosen_stage, world.size, sums.total(world))
        save_checkpoint(run_dir, kept, state, t.keep_checkpoints, world)

    def evaluates(step: int) -> bool:
        return step in (0, total) or bool(t.eval_every_steps and step % t.eval_every_steps == 0)

    if config.reference.outside:
        if config.reference.mode == "ahead" and reference is not None:   # audited where it scores, before its first value
            reference.wait_for(batches(min(done + 1, total)).batches)
            world.on_main(lambda: believe_earlier_audit(config, inputs.reference_key, inputs.dtype, terminal))
        world.on_main(lambda: add_parity(run_dir))
    before: dict[str, float] = {}
    if done == 0:
        same = reference if inputs.same_start else None
        check_step_0(policy, same, batches(1), order.pairs_of_step(1, t.epochs, t.max_steps), inputs.train, inputs.dtype, world)
        before = held_out(0)
    after = before
    if done and evaluates(done):
        if world.on_main(lambda: last_step(run_dir / "metrics.jsonl", "eval")) != done:     # ended between saving and evaluating
            after = held_out(done)
        elif done == total:
            after = evaluate_run(config, inputs, policy, reference, world)

    clock = Clock(world, config.cluster.peak_tflops or known_peak_tflops(world.device, inputs.dtype))
    sums = MetricSums(loss, world.device, resumed[1].sums if resumed and world.is_main else None)
    with terminal.progress(total, done, "training") as bar, PackedAhead(batches, done + 1, total) as packed:
        log = StepLog(tracker, bar, world)
        for step in range(done + 1, total + 1):
            now = packed.next()
            if reference is not None:
                try:
                    reference.wait_for(now.batches, before_waiting=log.catch_up)
                except (preemption.Stopped, UserError):        # on all ranks alike: the reference's values do not come
                    log.catch_up()
                    if step - 1 > done:
                        save(step - 1, sums)
                    raise
            clock.mark("data")
            part = train_step(policy, reference, now, loss, sums, world, clock)
            bad_loss = world.any_on_device(~part.isfinite())
            clock.mark("wait")
            lr = learning_rate(config.optim, step, total)
            grad_norm = policy.step(lr, skip=bad_loss)
            if reference is not None:
                reference.after_step(step)
            clock.mark("step")
            clock.count(now.work)

            row = None
            if step % t.log_every_steps == 0 or step == total:
                row, sums = (sums, clock.interval()), MetricSums(loss, world.device)
            log.add(StepResults.of(step, lr, bad_loss, grad_norm, row))
            asked = world.max(preemption.asked())
            saves = step == total or bool(asked) or bool(t.save_every_steps and step % t.save_every_steps == 0)
            if saves or evaluates(step):
                log.catch_up()                           # nothing is saved, or called the last, before it is known to be sound
            if saves:
                save(step, sums)
            if asked:
                tracker.finish({})
                raise preemption.Stopped(asked, f"step {step} of {total} is saved")
            if evaluates(step):
                after = held_out(step)
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
