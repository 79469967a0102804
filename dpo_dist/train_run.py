"""A training run once everything is open: its steps' packs, its evaluations, its checkpoints."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import Sampler
from dpo_dist.dynamics.record import VisitLog
from dpo_dist.dynamics.visits import remove_parts
from dpo_dist.evaluate import evaluate
from dpo_dist.evaluation.facts import Facts
from dpo_dist.evaluation.pairs import EvaluatedPairs
from dpo_dist.evaluation.results import keep_evaluation, mend_summaries
from dpo_dist.evaluation.sampled_kl import sampled_kl
from dpo_dist.evaluation.summary import Summary
from dpo_dist.policy import Policy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.audit import believe_earlier_audit
from dpo_dist.run.checkpoint import Checkpointed, Keep, TrainState
from dpo_dist.run.generations import write_generations
from dpo_dist.run.guard_log import SHOWN_PAIRS, Guard, how_to_go_on, make_guard
from dpo_dist.run.inputs import Inputs
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.not_finite import write_not_finite
from dpo_dist.run.open_models import open_models, scores_at_hand
from dpo_dist.run.provenance import add_parity
from dpo_dist.run.samples import Samples
from dpo_dist.run.save_timer import SaveTimer
from dpo_dist.run.saver import Saver
from dpo_dist.run.step_results import NotFinite
from dpo_dist.run.tracking import Tracker
from dpo_dist.run.tracking.make import Trackers, open_tracker
from dpo_dist.runtime import preemption
from dpo_dist.runtime.best import is_best_yet
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.step import StepBatches, step_batches
from dpo_dist.step0_checks import check_step_0


@dataclass(frozen=True)
class Run:
    """What a training run consists of."""

    config: RunConfig
    run_dir: RunDir
    inputs: Inputs
    sampler: Sampler
    total: int                           # optimizer steps
    policy: Policy
    reference: ReferenceEngine | None
    tracker: Tracker
    samples: Samples
    saver: Saver
    timer: SaveTimer
    visits: VisitLog
    guard: Guard | None                  # on rank 0
    world: World
    before: dict[str, float] = field(default_factory=dict)               # held-out means before training

    def batches(self, step: int) -> StepBatches:
        """This rank's packs of a step."""
        adapters = self.config.model.lora.rank > 0 or self.inputs.policy.adapter is not None
        flops = self.inputs.flops.training(frozen_base=adapters)
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
        self.visits.write(step)                          # for who looks at a run under way
        found = evaluate(self.config, self.inputs, self.policy, self.reference, self.world)
        means = found.means
        answers = self.samples.complete(self.policy, step, self.world) if self.samples.prompts else []
        scorer = scores_at_hand(self.config, self.inputs, self.policy, self.reference)
        kl = sampled_kl(self.policy, scorer, self.samples.prompts, answers, self.samples.how, self.inputs.pads,
                        self.world)
        self.world.on_main(lambda: self._keep(step, found.pairs, kl))
        if answers:                                      # written first: a row of metrics says that all is done
            self.tracker.log_samples(step, self.samples.rows(step, answers))
            self.world.on_main(lambda: write_generations(self.run_dir))
        if means:
            self.tracker.log({"step": step, "split": "eval", **means})
        return means

    def heed_guard(self, step: int, sums: MetricSums, terminal: Terminal) -> None:
        """Tells what the guard has found. Where that stops the run: saves this step; UserError. All ranks call it."""
        guard = self.guard
        if not self.world.max(guard.asks() if guard else 0.0):
            return
        trained_on = self._most_fallen()

        def tell() -> tuple[str, str] | None:
            assert guard is not None
            messages, stops = guard.tell(lambda found: self._most_fallen_held_out(found.step) if found.held_out
                                         else trained_on)
            for message in messages:
                terminal.say(message)
            return (" ".join(messages), how_to_go_on(stops)) if stops else None

        if stopped := self.world.on_main(tell):
            self.save(step, sums)
            kept = self.kept(step)
            raise UserError(f"{stopped[0]}. {kept[0].upper()}{kept[1:]}. {stopped[1]}")

    def _most_fallen(self) -> list[tuple[str, float]]:
        """(where, nats a token) of the newest step's pairs whose chosen answer fell most; none without a reference. All
        ranks call it."""
        ids, values = self.visits.newest
        beta, pairs = self.config.loss.beta, self.inputs.train
        if self.reference is None or beta is None:
            return []
        mine = values[0] / beta / pairs.counted()[ids, 0]
        order = [i for i in mine.argsort()[:SHOWN_PAIRS].tolist() if mine[i] < 0]
        parts = self.world.gather([(pairs[ids[i]].where, float(mine[i])) for i in order])
        return sorted((one for part in parts for one in part), key=lambda one: one[1])[:SHOWN_PAIRS]

    def _most_fallen_held_out(self, step: int) -> list[tuple[str, float]]:
        """The same of the held-out pairs as this step's evaluation has them, compared with the first; none where such
        files are missing or damaged."""
        before, now = (EvaluatedPairs.read(self.run_dir.evaluation(at)) for at in (0, step))
        if before is None or now is None or len(before) != len(now):
            return []
        fall = (now.policy_chosen - before.policy_chosen) / now.chosen_tokens
        return [(self.inputs.eval[int(now.pair[i])].where, float(fall[i])) for i in fall.argsort()[:SHOWN_PAIRS]
                if fall[i] < 0]

    def _keep(self, step: int, pairs: EvaluatedPairs | None, kl: Summary | None) -> None:
        if pairs is not None:
            keep_evaluation(self.run_dir, step, pairs, Facts.of(self.inputs.eval), self.config.loss,
                            reference_moves(self.config), kl)

    def save(self, step: int, sums: MetricSums) -> None:
        """Begins a checkpoint after this step. All ranks call it."""
        self.visits.write(step)                          # each rank's, before the checkpoint is whole
        state = TrainState(step, self.config.zero.chosen_stage, self.world.size, sums.total(self.world),
                           self.config.identity(), self.before, time.time())
        self.saver.save(checkpointed(self.policy, self.reference, self.visits), state)
        self.timer.restart()

    def evaluate_after_step(self, step: int, sums: MetricSums) -> None:
        """Evaluates, and saves this step where it is the best so far; also where a signal ends the evaluation, which is
        then made again. All ranks call it."""
        try:
            means = self.evaluate(step)
        except preemption.Stopped as stopped:
            self.save(step, sums)
            self.tracker.finish({})
            raise preemption.Stopped(stopped.signal, f"{self.kept(step)}, and {stopped.kept}") from stopped
        self.save_if_best(step, means, sums)

    @contextmanager
    def keeps_what_is_not_finite(self) -> Iterator[None]:
        """Inside, a step that is not finite leaves what reproduces it. All ranks are inside alike."""
        try:
            yield
        except NotFinite as error:
            self.saver.wait()
            train = self.config.train
            pair_ids = self.sampler.pairs_of_step(error.step, train.epochs, train.max_steps)
            shown = write_not_finite(error, self.run_dir, self.config, self.inputs.train, pair_ids,
                                     self.visits.of_step(error.step), self.world)
            raise FloatingPointError(f"{error}: {shown}") from error

    def kept(self, step: int) -> str:
        """What there is of this step, whose checkpoint was begun, once it is written. All ranks call it."""
        self.saver.wait()
        last = self.world.on_main(self.run_dir.newest_checkpoint)
        if last == self.run_dir.checkpoint(step):
            return f"step {step} of {self.total} is saved"
        return f"step {step} of {self.total} could not be saved, " + (
            f"{last.name} is the last checkpoint" if last else "there is no checkpoint yet")

    def save_if_best(self, step: int, means: dict[str, float], sums: MetricSums) -> None:
        """A checkpoint after this step where train.keep_best asks for one: its held-out means are the best so far. All
        ranks call it."""
        metric = self.config.train.keep_best
        self.saver.wait()                                # the best so far may be what is being written
        if metric and self.world.on_main(lambda: is_best_yet(self.run_dir, metric, step, means[metric])):
            self.save(step, sums)


def open_run(config: RunConfig, run_dir: RunDir, inputs: Inputs, sampler: Sampler, total: int,
             resumed: tuple[Path, TrainState] | None, world: World, terminal: Terminal) -> Run:
    """The run with all that it needs open, as its checkpoint left it, evaluated where that is due. All ranks call
    it."""
    done = resumed[1].step if resumed else 0
    policy, reference = open_models(config, inputs, [inputs.train, inputs.eval], world, terminal)
    visits = VisitLog(run_dir.visits, config.loss, world.rank, world.size, done)
    world.on_main(lambda: remove_parts(run_dir.visits))      # the checkpoint has them
    if resumed:
        for part in checkpointed(policy, reference, visits):
            part.load(resumed[0])
        terminal.say(f"resumed from {resumed[0].name}")
        if mended := world.on_main(lambda: mend_summaries(run_dir, done, inputs.eval, config.loss,
                                                          reference_moves(config))):
            terminal.say(mended)
    preemption.only_note()
    samples = Samples.of(config, inputs)
    tracker = open_tracker(config, run_dir.path, world.is_main, done)
    guard = make_guard(config, run_dir, inputs, samples, done) if world.is_main else None
    train = config.train
    saver = Saver(run_dir, Keep(train.keep_checkpoints, train.keep_best, train.keep_every_hours),
                  train.save_in_background, world, terminal.say)
    timer = SaveTimer(train.save_every_minutes if world.is_main else None)
    run = Run(config, run_dir, inputs, sampler, total, policy, reference,
              Trackers(tracker, guard) if guard else tracker, samples, saver, timer, visits, guard, world)
    run = replace(run, before=evaluate_before(run, resumed[1] if resumed else None, terminal))
    world.heed_signals("its next step had not begun")
    return run


def reference_moves(config: RunConfig) -> bool:
    return config.loss.needs_reference and config.reference.sync.mode != "none"


def checkpointed(policy: Policy, reference: ReferenceEngine | None, visits: VisitLog) -> list[Checkpointed]:
    """The parts of a run that a checkpoint holds."""
    return [part for part in (policy, reference, visits) if part is not None]


def evaluate_before(run: Run, resumed: TrainState | None, terminal: Terminal) -> dict[str, float]:
    """The held-out means before training, once step 0's checks pass. What the last start still had to evaluate is
    evaluated. All ranks call it."""
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
        same_start = run.reference if inputs.same_start else None
        first_pairs = run.sampler.pairs_of_step(1, config.train.epochs, config.train.max_steps)
        check_step_0(run.policy, same_start, run.batches(1), first_pairs, inputs.train, inputs.dtype, world)
        return run.evaluate(0)
    if run.evaluates_after(done) and not world.on_main(
            lambda: any(row["step"] == done for row in run.run_dir.rows("eval"))):
        run.evaluate(done)                               # the last start ended between saving and evaluating
    return resumed.before
