"""The training run, top to bottom. With torchrun: torchrun --nproc-per-node 8 -m dpo_dist.train [overrides]."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import make_sampler
from dpo_dist.run.checkpoint import check_fits, resume_point
from dpo_dist.run.command import write_command
from dpo_dist.run.guard_log import ASKS as GUARD_ASKS
from dpo_dist.run.guard_log import check_not_stopped
from dpo_dist.run.inputs import read_inputs
from dpo_dist.run.judging import judge_run
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.open_models import tell_faster, without_auto
from dpo_dist.run.perf import Clock, known_peak_tflops
from dpo_dist.run.provenance import check_same_run, provenance, write_provenance
from dpo_dist.run.push import push_model
from dpo_dist.run.schedule import learning_rate
from dpo_dist.run.services import check_services
from dpo_dist.run.step_results import StepLog, StepResults
from dpo_dist.run.tracking.metrics_file import restore_run
from dpo_dist.runtime import preemption
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.prefetch import prefetched
from dpo_dist.runtime.process import run_entry, stop_now
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import StepBatches, train_step
from dpo_dist.train_end import finish, is_finished, report
from dpo_dist.train_run import Run, open_run


def train(config: RunConfig, world: World, terminal: Terminal, words: Sequence[str] = ()) -> None:
    """Trains, evaluates and exports; goes on from the newest checkpoint. words: the overrides that were typed."""
    preemption.listen(partial(stop_now, config, terminal))
    world.on_main(lambda: check_services(config))
    inputs = read_inputs(config, world, terminal)
    if not len(inputs.train):
        raise UserError("data.train leaves no pairs to train on; see the counts above")
    run_dir = RunDir(config.run_dir)
    sampler = make_sampler(inputs.train, config.train, config.data.group_by_prompt)
    total = sampler.total_steps(config.train.epochs, config.train.max_steps)
    lineage = provenance(config, inputs, world)
    if damaged := world.on_main(lambda: check_same_run(run_dir, config, lineage)):
        terminal.say(f"{damaged}; it is written anew")
    resumed = resume_point(run_dir, world, terminal)
    done = resumed[1].step if resumed else 0
    if resumed:
        world.on_main(partial(restore_run, run_dir, resumed[0], terminal.say))
    config = without_auto(config, inputs, resumed[1] if resumed else None, world, terminal)
    check_fits(resumed, config, world.size)
    if damaged:
        write_provenance(run_dir, config, inputs, lineage, world)        # also where there is nothing else to do
    tell_faster(config, inputs, world, terminal)
    if done == total and world.on_main(lambda: is_finished(config, run_dir, inputs, total, terminal.say)):
        exports = run_dir.exports(config.export.merged, config.export.adapter)
        terminal.say(f"nothing to do: all {total} steps are done, the model is in {' and '.join(map(str, exports))}")
        world.on_main(lambda: push_model(config, run_dir, terminal))
        world.on_main(lambda: judge_run(config, run_dir, inputs, total, terminal))
        return
    world.on_main(lambda: check_not_stopped(run_dir, config.guard, done))
    write_provenance(run_dir, config, inputs, lineage, world)
    world.on_main(lambda: write_command(run_dir, words))
    if done < total:
        world.on_main(lambda: run_dir.judge_json.unlink(missing_ok=True))        # of an earlier end of this run

    run = open_run(config, run_dir, inputs, sampler, total, resumed, world, terminal)
    policy, reference, tracker, timer, guard = run.policy, run.reference, run.tracker, run.timer, run.guard
    clock = Clock(world, config.cluster.peak_tflops or known_peak_tflops(world.device, inputs.dtype))
    sums = MetricSums(config.loss, world.device, resumed[1].sums if resumed and world.is_main else None)

    with (run.saver, terminal.progress(total, done, "training") as bar,
          prefetched(run.batches, done + 1, total) as steps, run.keeps_what_is_not_finite()):
        log = StepLog(tracker, bar, world)
        for step, batches in steps:
            wait_for_reference(run, step, done, batches, sums, log)
            clock.mark("data")
            loss = train_step(policy, reference, batches, config.loss, sums, world, clock, run.visits)
            run.visits.end_step(step)
            not_finite = world.any_on_device(~loss.isfinite())
            clock.mark("wait")
            lr = learning_rate(config.optim, step, total)
            grad_norm = policy.step(lr, skip=not_finite)
            if reference is not None:
                reference.after_step(step)
            clock.mark("step")
            clock.count(batches.work)

            row = None
            if run.is_due(config.train.log_every_steps, step):
                row = sums, clock.interval(run.saver.told())
                sums = MetricSums(config.loss, world.device)
            log.add(StepResults.of(step, lr, not_finite, grad_norm, row))
            asked = world.max(max(preemption.received(), timer.asks(), guard.asks() if guard else 0.0))
            signal = int(asked)                          # 0 where only the timer asks, or the guard
            saves = asked > GUARD_ASKS or run.is_due(config.train.save_every_steps, step)
            evaluates = run.evaluates_after(step)
            if saves or evaluates:
                log.catch_up()                           # nothing is saved before it is known to be sound
            if saves:
                run.save(step, sums)
            if signal:
                tracker.finish({})
                raise preemption.Stopped(signal, run.kept(step))
            if evaluates:
                run.evaluate_after_step(step, sums)
            if evaluates or asked == GUARD_ASKS:
                run.heed_guard(step, sums, terminal)
            clock.mark(None)                             # evaluation and saving are not training time

    finish(run, terminal)


def wait_for_reference(run: Run, step: int, done: int, batches: StepBatches, sums: MetricSums, log: StepLog) -> None:
    """Returns once the reference has the step's values. If they do not come, the finished steps are saved first."""
    if run.reference is None:
        return
    try:
        run.reference.wait_for(batches.batches, before_waiting=log.catch_up)
    except (preemption.Stopped, UserError):              # on all ranks alike
        log.catch_up()
        if step - 1 > done:
            run.save(step - 1, sums)
        raise


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], partial(train, words=sys.argv[1:]), owns_run=True, afterwards=report))
