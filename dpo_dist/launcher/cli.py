"""The command `dpo-dist VERB [key=value ...]`. Help is instant: no torch, and a verb imports only what it needs."""
from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from dpo_dist.config.compose import compose, documented_keys, experiments
from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.clusters import launcher_of
from dpo_dist.launcher.local import device_count
from dpo_dist.launcher.plan import LaunchPlan, plan_stages
from dpo_dist.launcher.status import status
from dpo_dist.runtime.disk_faults import disk_fault
from dpo_dist.runtime.standard_streams import open_standard_streams

VERBS = {
    "run": "the whole way: audit the data, score the reference, train, evaluate on held-out pairs, export",
    "audit": "look at the data: what repeats, contradicts, leaks, or tells chosen from rejected without reading",
    "score": "fill the cache with the reference's log-probs, and nothing else",
    "train": "train (scoring what the cache lacks), evaluate, export; the same command goes on where it stopped",
    "eval": "loss, rewards and accuracy of model.path on held-out pairs",
    "export": "write <run.dir>/model from the newest whole checkpoint",
    "harness": "lm-evaluation-harness' tasks (eval.harness.tasks) on <run.dir>/model",
    "show": "the rows as they will be trained on: texts, ids, which tokens count, what is cut or left out and why",
    "plan": "what `run` would start, and what it needs: stages, ranks, commands; memory a rank, step time, what does "
            "not fit",
    "doctor": "look at this machine: what would stop a run with these keys, and what to do about it",
    "report": "one HTML file about a run or a sweep, or about several runs side by side: dpo-dist report RUN [RUN ...]",
    "verify": "is all that a run's numbers come from still what it was? dpo-dist verify RUN_DIR",
    "next": "the next round's rows of a run: without the pairs whose labels look flipped: dpo-dist next RUN_DIR",
    "status": "where the run in the given run.dir is: dpo-dist status RUN_DIR",
}

# verbs about runs that exist: {verb: the module that the command becomes, which gets all other words}
ON_RUNS = {"report": "dpo_dist.report", "verify": "dpo_dist.verify", "next": "dpo_dist.next"}

SHOW_OPTIONS = """
  --rows N    the first N rows of each data set (3), then the longest of those looked at, and one at random
  --json      the first N rows of each data set alone, for a program, one object a line: where, data_set, split,
              prompt_ids, chosen_ids, rejected_ids, chosen_counts, rejected_counts (0 or 1 a token), prompt, chosen,
              rejected (the decoded texts; null without a tokenizer), lost_tokens (to truncation), strength, weight,
              left_out (of what data.on_missing_content=warn keeps).
              A row of which there is no pair: where, data_set, dropped (the reason), detail, and stopped_by (the
              setting that makes a run stop there, or null)

It starts no run, writes nothing and needs model.path only for the tokenizer. A row is a pair: a record of several
rated responses gives several.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 on success, 2 for a user's mistake, else what the failed stage gave."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):         # whatever the locale and the names of files, it is printed
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:            # see launcher/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _check_working_folder()
        code = _main(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing had begun that the same command does not do again", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:                                  # the reader closed the pipe: dpo-dist --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {disk_fault(error, {'the working folder': Path.cwd()}) or error}", file=sys.stderr)
        return 2


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("the working folder has been removed; cd to one that is there") from error


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise UserError(f"unknown command '{verb}': {nearest(verb, VERBS)}")
    if verb in ON_RUNS:                                      # it has its own --help
        os.execv(sys.executable, [sys.executable, "-m", ON_RUNS[verb], *rest])
    if "--help" in rest or "-h" in rest:
        print(_verb_help(verb))
        return 0
    if verb == "status":
        print(status(_run_dir(rest)))
        return 0
    cfg, dry_run = _take_cfg(rest), _take("--dry-run", rest)
    sweeps = verb == "run" and not cfg and _take("-m", rest)
    options = _take_show_options(rest) if verb == "show" else []
    for word in rest:
        if word.startswith("-"):
            raise UserError(f"unknown option '{word}': the options are --help, --cfg job, --dry-run, -m for run alone, "
                            "--rows N and --json for show alone; everything else is key=value")
        if word.startswith("sweep=") and not sweeps:
            raise UserError(f"{word} names the runs of a sweep; write dpo-dist run -m {word} ...")
    if sweeps:
        from dpo_dist.launcher.sweep.multirun import multirun

        return multirun(rest, dry_run)
    if verb == "doctor":
        from dpo_dist.launcher.doctor import doctor, with_model

        return doctor(compose(with_model(rest)))
    config = compose(rest)
    if config.cluster.jobs_at_once not in (None, 1):
        raise UserError(f"cluster.jobs_at_once={config.cluster.jobs_at_once} does nothing without a sweep; remove it, "
                        "or sweep with run -m")
    if cfg:
        print(config.run_dir if cfg == "run_dir" else OmegaConf.to_yaml(to_dict(config)).rstrip())
        return 0
    if verb == "show":
        os.execv(sys.executable, [sys.executable, "-m", "dpo_dist.show", *options, *rest])   # becomes the entry point
    if verb == "plan":
        print(plan_text(rest, config))
        return 0
    launch = plan_stages(verb, config, rest, device_count(config.cluster))
    return launcher_of(config).start(launch, config, dry_run)


def _take_cfg(rest: list[str]) -> str | None:
    """What --cfg is to show, or None without it. Takes both words out of `rest`."""
    if "--cfg" not in rest:
        return None
    at = rest.index("--cfg")
    what = rest[at + 1:at + 2]
    if what not in (["job"], ["run_dir"]):
        raise UserError("--cfg takes the word job or run_dir, as in: dpo-dist train model.path=... --cfg job")
    del rest[at:at + 2]
    return what[0]


def _take(option: str, rest: list[str]) -> bool:
    """Whether the option is given. Takes it out of `rest`."""
    given = option in rest
    if given:
        rest.remove(option)
    return given


def _take_show_options(rest: list[str]) -> list[str]:
    """--rows N and --json, as the entry point takes them. Takes them out of `rest`."""
    options = ["--json"] if _take("--json", rest) else []
    for at, word in enumerate(rest):
        if word == "--rows" or word.startswith("--rows="):
            number = word[7:] if "=" in word else "".join(rest[at + 1:at + 2])
            if not re.fullmatch(r"0*[1-9]\d*", number):
                raise UserError("--rows takes a whole number greater than 0, as in: dpo-dist show --rows 5 ...")
            del rest[at:at + (1 if "=" in word else 2)]
            return ["--rows", number, *options]
    return options


def _run_dir(rest: list[str]) -> Path:
    if len(rest) != 1:
        raise UserError("status takes one folder, as in: dpo-dist status runs/my-run")
    return Path(rest[0].removeprefix("run.dir="))


def plan_text(words: Sequence[str], config: RunConfig) -> str:
    """What `dpo-dist plan` with these words says."""
    from dpo_dist.sizing.report import sizing_lines

    launch = plan_stages("run", config, words, device_count(config.cluster))
    return "\n".join([_stages(launch, config), "", *sizing_lines(config, launch.stages[-1].procs_per_node)])


def _stages(launch: LaunchPlan, config: RunConfig) -> str:
    device = {"cpu": "CPU", "cuda": "GPU", "auto": "GPU, or CPU where there is none"}[config.cluster.device]
    lines = [f"run.dir   {launch.run_dir}", f"cluster   {config.cluster.name}"]
    commands = launcher_of(config).commands(launch, config)
    for stage in launch.stages:
        beside = f", beside {stage.beside}" if stage.beside else ""
        when = f", after {', '.join(stage.after)}" if stage.after else beside
        lines += ["", stage.name + when,
                  f"  ranks   {stage.ranks}: {stage.nodes} node{'s' * (stage.nodes > 1)} with {stage.procs_per_node}, "
                  f"{f'each on a {device}' if stage.computes else 'on the CPU'}",
                  *([f"  servers {stage.server_nodes}: of the reference, each on a node of its own"]
                    if stage.server_nodes else []),
                  f"  {'submits' if config.cluster.submits else 'by hand'} {shlex.join(commands[stage.name])}"]
    return "\n".join(lines)


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8}{text}" for name, text in VERBS.items())
    return (f"usage: dpo-dist VERB [key=value ...]\n\n{verbs}\n\ndpo-dist VERB --help lists the keys; --cfg job prints "
            "the resolved config; --dry-run prints what cluster=slurm would submit.\n"
            "dpo-dist run -m loss.beta=0.05,0.1,0.3 optim.lr=5e-7,1e-6 ... runs every combination; or -m "
            "sweep=beta_lr, or -m sweep=optuna.")


def _verb_help(verb: str) -> str:
    keys = [f"  {key + '=' + default:<44} {meaning}" for key, default, meaning in documented_keys()]
    recipes = [f"  experiment={name:<33} {what}" for name, what in experiments().items()]
    return "\n".join([
        f"dpo-dist {verb} [key=value ...]: {VERBS[verb]}", *([SHOW_OPTIONS.rstrip()] if verb == "show" else []), "",
        "Whole configurations, in which any key may be set as well (conf/experiment/):", "", *recipes, "",
        "Groups are chosen as in loss=ipo zero=zero2 tracking=wandb; keys are set as in loss.beta=0.3:", "", *keys])


if __name__ == "__main__":
    sys.exit(main())
