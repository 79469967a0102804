"""The training run, top to bottom. With torchrun: torchrun --nproc-per-node 8 -m dpo_dist.train [overrides]."""
from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import Sampler, make_sampler
from dpo_dist.evaluate import evaluate
from dpo_dist.export import export_model
from dpo_dist.policy import Policy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.audit import believe_earlier_audit
from dpo_dist.run.checkpoint import Checkpointed, TrainState, resume_point, save_checkpoint
from dpo_dist.run.inputs import Inputs, read_inputs
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.open_models import open_models, tell_faster, without_auto
from dpo_dist.run.perf import Clock, known_peak_tflops
from dpo_dist.run.provenance import add_parity, check_same_run, provenance, write_run
from dpo_dist.run.schedule import learning_rate
from dpo_dist.run.step_results import StepLog, StepResults
from dpo_dist.run.tracking import Tracker
from dpo_dist.run.tracking.make import open_tracker
from dpo_dist.runtime import preemption
from dpo_dist.runtime.prefetch import prefetched
from dpo_dist.runtime.process import exit_with, run_entry
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import StepBatches, step_batches, train_step
from dpo_dist.step0_checks import check_step_0


def train(config: RunConfig, world: World, terminal: Terminal) -> None:
    """Trains, evaluates and exports; goes on from the newest checkpoint."""
    preemption.listen()
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
    resumed = world.on_main(lambda: resume_point(run_dir, config.zero.chosen_stage, world.size))
    done = resumed[1].step if resumed else 0
    if done == total and world.on_main(run_dir.model.exists):
        terminal.say(f"nothing to do: all {total} steps are done, the model is in {run_dir.model}")
        return
    world.on_main(lambda: write_run(run_dir, config, lineage))

    policy, reference = open_models(config, inputs, [inputs.train, inputs.eval], world, terminal)
    if resumed:
        for part in checkpointed(policy, reference):
            part.load(resumed[0])
        terminal.say(f"resumed from {resumed[0].name}")
    tracker = open_tracker(config, run_dir.path, world.is_main, done)
    run = Run(config, run_dir, inputs, sampler, total, policy, reference, tracker, world)
    before, after = evaluate_before(run, resumed[1] if resumed else None, terminal)
    run = replace(run, before=before)
    clock = Clock(world, config.cluster.peak_tflops or known_peak_tflops(world.device, inputs.dtype))
    sums = MetricSums(config.loss, world.device, resumed[1].sums if resumed and world.is_main else None)

    with terminal.progress(total, done, "training") as bar, prefetched(run.batches, done + 1, total) as steps:
        log = StepLog(tracker, bar, world)
        for step, batches in steps:
            wait_for_reference(run, step, done, batches, sums, log)
            clock.mark("data")
            loss = train_step(policy, reference, batches, config.loss, sums, world, clock)
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
            signal = world.max(preemption.received())
            saves = bool(signal) or run.is_due(config.train.save_every_steps, step)
            evaluates = run.evaluates_after(step)
            if saves or evaluates:
                log.catch_up()                           # nothing is saved before it is known to be sound
            if saves:
                run.save(step, sums)
            if signal:
                tracker.finish({})
                raise preemption.Stopped(signal, f"step {step} of {total} is saved")
            if evaluates:
                after = run.evaluate(step)
            clock.mark(None)                             # evaluation and saving are not training time

    model = export_model(run_dir, policy, inputs, config, after, world, terminal)
    tracker.finish(after)
    if reference is not None:
        reference.close()
    tell_results(terminal, run, after, model)


@dataclass(frozen=True)
class Run:
    """What a training run consists of, once everything is open."""

    config: RunConfig
    run_dir: RunDir
    inputs: Inputs
    sampler: Sampler
    total: int                           # optimizer steps
    policy: Policy
    reference: ReferenceEngine | None
    tracker: Tracker
    world: World
    before: dict[str, float] = field(default_factory=dict)               # held-out means before training

    def batches(self, step: int) -> StepBatches:
        """This rank's packs of a step."""
        flops = self.inputs.flops.training(frozen_base=self.config.model.lora.rank > 0)
        return step_batches(
            self.inputs.train, self.sampler.pairs_of_step(step, self.config.train.epochs, self.config.train.max_steps),
            self.config.loss, self.world, self.config.train.tokens_per_microbatch, flops, self.reference)

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether this step is a multiple of `every`, or the last one."""
        return step == self.total or bool(every and step % every == 0)

    def evaluates_after(self, step: int) -> bool:
        return step == 0 or self.is_due(self.config.train.eval_every_steps, step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Means over the held-out pairs, also written as a metrics row; empty if there are none. All ranks call it."""
        means = evaluate(self.config, self.inputs, self.policy, self.reference, self.world)
        if means:
            self.tracker.log({"step": step, "split": "eval", **means})
        return means

    def save(self, step: int, sums: MetricSums) -> None:
        """A checkpoint after this step. All ranks call it."""
        state = TrainState(step, self.config.zero.chosen_stage, self.world.size, sums.total(self.world), self.before)
        save_checkpoint(self.run_dir, checkpointed(self.policy, self.reference), state,
                        self.config.train.keep_checkpoints, self.world)


def checkpointed(policy: Policy, reference: ReferenceEngine | None) -> list[Checkpointed]:
    """The parts of a run that a checkpoint holds."""
    return [policy] if reference is None else [policy, reference]


def evaluate_before(run: Run, resumed: TrainState | None,
                    terminal: Terminal) -> tuple[dict[str, float], dict[str, float]]:
    """(held-out means before training, those after the steps done), once step 0's checks pass. All ranks call it."""
    config, inputs, world = run.config, run.inputs, run.world
    done = resumed.step if resumed else 0
    if config.reference.outside:
        # the scoring processes audit it before their first value
        if config.reference.mode == "ahead" and run.reference is not None:
            run.reference.wait_for(run.batches(min(done + 1, run.total)).batches)
            world.on_main(lambda: believe_earlier_audit(config, inputs.reference_key, inputs.dtype, terminal))
        world.on_main(lambda: add_parity(run.run_dir))
    if resumed is None:
        # where policy and reference start from the same weights, every first margin must be 0
        same_start = run.reference if inputs.policy_digest == inputs.reference_digest else None
        first_pairs = run.sampler.pairs_of_step(1, config.train.epochs, config.train.max_steps)
        check_step_0(run.policy, same_start, run.batches(1), first_pairs, inputs.train, inputs.dtype, world)
        means = run.evaluate(0)
        return means, means
    before = means_before(run, resumed)
    if run.evaluates_after(done):
        # the last start ended between saving and evaluating
        if not world.on_main(lambda: any(row["step"] == done for row in run.run_dir.rows("eval"))):
            return before, run.evaluate(done)
        if done == run.total:
            return before, evaluate(config, inputs, run.policy, run.reference, world)
    return before, {}


def means_before(run: Run, resumed: TrainState) -> dict[str, float]:
    """The held-out means before training of a run that goes on: from its checkpoint, else from its metrics; empty where
    neither has them. All ranks call it."""
    if resumed.before is not None:
        return resumed.before
    rows = run.world.on_main(lambda: [row for row in run.run_dir.rows("eval") if row["step"] == 0])
    return {name: float(value) for name, value in (rows[-1] if rows else {}).items() if name not in ("step", "split")}


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


def tell_results(terminal: Terminal, run: Run, after: dict[str, float], model: Path) -> None:
    """The held-out table, and where everything is."""
    if after:
        rows = [[name, f"{run.before[name]:.4f}" if name in run.before else "-", f"{value:.4f}"]
                for name, value in after.items()]
        terminal.table(f"held-out pairs: {len(run.inputs.eval)}", ["metric", "before", "after"], rows)
    terminal.say(f"model: {model}\nmetrics: {run.run_dir.metrics}\nlogs: {run.run_dir.logs}")


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], train, owns_run=True))
