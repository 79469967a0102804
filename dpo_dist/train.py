"""The training run, top to bottom. With torchrun: torchrun --nproc-per-node 8 -m dpo_dist.train [overrides]."""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import make_sampler
from dpo_dist.dynamics.record import VisitLog
from dpo_dist.dynamics.visits import keep_until
from dpo_dist.dynamics.write import write_dynamics
from dpo_dist.evaluation.results import read_summaries
from dpo_dist.evaluation.show import summary_lines
from dpo_dist.export import export
from dpo_dist.report.write import write_report
from dpo_dist.run.checkpoint import resume_point
from dpo_dist.run.command import write_command
from dpo_dist.run.generations import show_generations, write_generations
from dpo_dist.run.guard_log import ASKS as GUARD_ASKS
from dpo_dist.run.guard_log import check_not_stopped, make_guard
from dpo_dist.run.inputs import read_inputs
from dpo_dist.run.judging import check_judge, judge_run
from dpo_dist.run.lm_eval import check_harness
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.open_models import open_models, tell_faster, without_auto
from dpo_dist.run.perf import Clock, known_peak_tflops
from dpo_dist.run.provenance import check_same_run, provenance, write_provenance
from dpo_dist.run.push import check_push, push_model
from dpo_dist.run.samples import Samples, show_samples
from dpo_dist.run.save_timer import SaveTimer
from dpo_dist.run.schedule import learning_rate
from dpo_dist.run.step_results import StepLog, StepResults
from dpo_dist.run.tracking.make import Trackers, check_tracker, open_tracker
from dpo_dist.runtime import preemption
from dpo_dist.runtime.best import exported_step
from dpo_dist.runtime.prefetch import prefetched
from dpo_dist.runtime.process import exit_with, run_entry
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import StepBatches, train_step
from dpo_dist.train_run import Run, checkpointed, evaluate_before


def train(config: RunConfig, world: World, terminal: Terminal, words: Sequence[str] = ()) -> None:
    """Trains, evaluates and exports; goes on from the newest checkpoint. words: the overrides that were typed."""
    preemption.listen()
    world.on_main(lambda: check_tracker(config))
    world.on_main(lambda: check_push(config))
    world.on_main(lambda: check_judge(config.eval.judge))
    world.on_main(lambda: check_harness(config.eval.harness))
    inputs = read_inputs(config, world, terminal)
    if not len(inputs.train):
        raise UserError("data.train leaves no pairs to train on; see the counts above")
    config = without_auto(config, inputs, world, terminal)
    tell_faster(config, inputs, world, terminal)
    run_dir = RunDir(config.run_dir)
    sampler = make_sampler(inputs.train, config.train, config.data.group_by_prompt)
    total = sampler.total_steps(config.train.epochs, config.train.max_steps)
    lineage = provenance(config, inputs, world)
    world.on_main(lambda: check_same_run(run_dir, config, lineage))
    resumed = world.on_main(lambda: resume_point(run_dir, config, world.size))
    done = resumed[1].step if resumed else 0
    exports = run_dir.exports(config.export.merged, config.export.adapter)
    if done == total and world.on_main(lambda: all(folder.exists() for folder in exports)):
        terminal.say(f"nothing to do: all {total} steps are done, the model is in {' and '.join(map(str, exports))}")
        world.on_main(lambda: push_model(config, run_dir, terminal))
        world.on_main(lambda: judge_run(config, run_dir, inputs, total, terminal))
        return
    world.on_main(lambda: check_not_stopped(run_dir, config.guard, done))
    write_provenance(run_dir, config, inputs, lineage, world)
    world.on_main(lambda: write_command(run_dir, words))
    world.on_main(lambda: run_dir.judge_json.unlink(missing_ok=True))            # of an earlier end of this run

    policy, reference = open_models(config, inputs, [inputs.train, inputs.eval], world, terminal)
    if resumed:
        for part in checkpointed(policy, reference):
            part.load(resumed[0])
        terminal.say(f"resumed from {resumed[0].name}")
    samples = Samples.of(config, inputs)
    tracker = open_tracker(config, run_dir.path, world.is_main, done)
    guard = make_guard(config, run_dir, inputs, samples, done) if world.is_main else None
    tracker = Trackers(tracker, guard) if guard else tracker
    timer = SaveTimer(config.train.save_every_minutes if world.is_main else None)
    world.on_main(lambda: keep_until(run_dir.visits, done))              # those after it are seen again
    visits = VisitLog(run_dir.visits, config.loss, world.rank, done)
    run = Run(config, run_dir, inputs, sampler, total, policy, reference, tracker, samples, timer, visits, guard, world)
    run = replace(run, before=evaluate_before(run, resumed[1] if resumed else None, terminal))
    clock = Clock(world, config.cluster.peak_tflops or known_peak_tflops(world.device, inputs.dtype))
    sums = MetricSums(config.loss, world.device, resumed[1].sums if resumed and world.is_main else None)

    with terminal.progress(total, done, "training") as bar, prefetched(run.batches, done + 1, total) as steps:
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
                row, sums = (sums, clock.interval()), MetricSums(config.loss, world.device)
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
                raise preemption.Stopped(signal, f"step {step} of {total} is saved")
            if evaluates:
                run.save_if_best(step, run.evaluate(step), sums)
            if evaluates or asked == GUARD_ASKS:
                run.heed_guard(step, sums, terminal)
            clock.mark(None)                             # evaluation and saving are not training time

    taught = world.on_main(lambda: (write_dynamics(run_dir, inputs.train) or {}).get("counts"))
    exported, after = load_best(run, terminal)
    models = export(run_dir, policy, inputs, config, after, world, terminal)
    tracker.finish(after)
    if reference is not None:
        reference.close()
    tell_results(terminal, run, exported, after, models)
    if taught:
        terminal.say(f"labels that look flipped: {taught['suspects']:,} of {len(inputs.train):,}, ranked in "
                     f"{run_dir.suspects}; dpo-dist next {run_dir.path} writes rows without them")
    world.on_main(lambda: push_model(config, run_dir, terminal))
    world.on_main(lambda: judge_run(config, run_dir, inputs, total, terminal))


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


def load_best(run: Run, terminal: Terminal) -> tuple[int, dict[str, float]]:
    """(the step whose weights the policy has now, its held-out means): the last one, or the best by train.keep_best.
    All ranks call it."""
    metric = run.config.train.keep_best
    step, means = run.world.on_main(lambda: exported_step(run.run_dir, metric, run.total))
    if step != run.total:
        run.policy.load(run.run_dir.checkpoint(step))
    if metric:
        terminal.say(f"exported: step {step} of {run.total}, the best by held-out {metric}: {means[metric]:.4f}")
    return step, means


def tell_results(terminal: Terminal, run: Run, exported: int, after: dict[str, float], models: list[Path]) -> None:
    """The held-out table, a few answers, and where everything is."""
    if after:
        rows = [[name, f"{run.before[name]:.4f}" if name in run.before else "-", f"{value:.4f}"]
                for name, value in after.items()]
        terminal.table(f"held-out pairs: {len(run.inputs.eval)}", ["metric", "before", "after"], rows)
        summary = next((one for one in read_summaries(run.run_dir) if one["step"] == exported), None)
        if summary is not None:                          # not of runs whose last evaluation is from before these files
            terminal.say("\n".join(summary_lines(summary)))
    if run.samples.prompts:
        show_samples(terminal, run.run_dir, {"before": 0, "after": exported})
        if run.world.is_main:
            show_generations(terminal, write_generations(run.run_dir, exported))
    for event in run.guard.events if run.guard else []:
        terminal.say(f"guard.on_{event['guard']} at step {event['step']}: see {run.run_dir.guard}")
    terminal.say(f"model: {' and '.join(map(str, models))}\nmetrics: {run.run_dir.metrics}\nlogs: {run.run_dir.logs}")


def report(config: RunConfig, run_dir: RunDir, terminal: Terminal) -> None:
    """Writes report.html, also of a run that stopped or failed, where the folder holds this run and something to show.
    A report that fails costs the run nothing."""
    if not run_dir.metrics.exists() or not run_dir.holds(config.identity_dict()):
        return
    try:
        terminal.say(f"report: {write_report([run_dir.path])}")
    except Exception as error:                           # whatever it is, the model is trained and exported
        logging.getLogger(__name__).exception("the report failed")
        terminal.say(f"report: not written ({type(error).__name__}: {error}); the run itself is whole, and dpo-dist "
                     f"report {run_dir.path} tries again")


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], partial(train, words=sys.argv[1:]), owns_run=True, afterwards=report))
