"""How a training run ends: what each pair taught, the weights that are exported, and what a person is told."""
from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dpo_dist.config.schema import RunConfig
from dpo_dist.dynamics.record import VisitLog
from dpo_dist.dynamics.visits import remove_parts
from dpo_dist.dynamics.write import dynamics_are_whole, write_dynamics
from dpo_dist.evaluation.results import mend_summaries, read_summaries
from dpo_dist.evaluation.show import summary_lines
from dpo_dist.export import are_whole, export
from dpo_dist.report.write import write_report
from dpo_dist.run.checkpoint import load_checkpoint
from dpo_dist.run.generations import show_generations, write_generations
from dpo_dist.run.inputs import Inputs
from dpo_dist.run.judging import judge_run
from dpo_dist.run.push import push_model
from dpo_dist.run.samples import show_samples
from dpo_dist.runtime import preemption
from dpo_dist.runtime.best import exported_step
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.train_run import Run, reference_moves


def finish(run: Run, terminal: Terminal) -> None:
    """Exports, and tells what came out. All ranks call it, after the last step.

    A signal does not end the export: it takes minutes at most, which is what a scheduler's grace is for, and begun anew
    it would need the models loaded again. Killed in its midst, it has left the last checkpoint and no folder.
    """
    config, inputs, run_dir, world = run.config, run.inputs, run.run_dir, run.world
    taught = world.on_main(lambda: (write_dynamics(run_dir, inputs.train, terminal.say) or {}).get("counts"))
    exported, after = load_best(run, terminal)
    models = export(run_dir, run.policy, inputs, config, after, world, terminal)
    run.tracker.finish(after)
    if run.reference is not None:
        run.reference.close()
    tell_results(terminal, run, exported, after, models)
    if taught:
        terminal.say(f"labels that look flipped: {taught['suspects']:,} of {len(inputs.train):,}, ranked in "
                     f"{run_dir.suspects}; dpo-dist next {run_dir.path} writes rows without them")
    if config.export.push_to_hub or config.eval.judge.is_asked:
        preemption.end_at_once()                         # the same command does what is left
    world.on_main(lambda: push_model(config, run_dir, terminal))
    world.on_main(lambda: judge_run(config, run_dir, inputs, run.total, terminal))


def is_finished(config: RunConfig, run_dir: RunDir, inputs: Inputs, total: int, say: Callable[[str], None]) -> bool:
    """Whether an earlier start has done everything, and what it left is as it was. What the run says of its pairs is
    made again where it is damaged, as no model is needed for it; `say` tells."""
    exports = run_dir.exports(config.export.merged, config.export.adapter)
    evaluated = not len(inputs.eval) or any(row["step"] == total for row in run_dir.rows("eval"))
    if not (evaluated and are_whole(exports, say)):
        return False
    if mended := mend_summaries(run_dir, total, inputs.eval, config.loss, reference_moves(config)):
        say(mended)
    if not dynamics_are_whole(run_dir):
        remove_parts(run_dir.visits)
        VisitLog(run_dir.visits, config.loss, 0, 1, total).load(run_dir.checkpoint(total))
        if write_dynamics(run_dir, inputs.train, say):
            say(f"{run_dir.datamap_json.name} or {run_dir.suspects.name} was damaged or missing: both are made again")
    return True


def load_best(run: Run, terminal: Terminal) -> tuple[int, dict[str, float]]:
    """(the step whose weights the policy has now, its held-out means): the last one, or the best by train.keep_best.
    All ranks call it."""
    metric = run.config.train.keep_best
    step, means = run.world.on_main(lambda: exported_step(run.run_dir, metric, run.total))
    if step != run.total:
        load_checkpoint([run.policy], run.run_dir.checkpoint(step), run.world)
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
        found = write_generations(run.run_dir, exported) if run.world.is_main else None
        if found is not None:
            show_generations(terminal, found)
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
