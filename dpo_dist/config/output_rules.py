"""Rules on what a run leaves: the checkpoint that is exported, samples, and the upload. No torch here."""
from __future__ import annotations

import re

from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.objectives import OBJECTIVES
from dpo_dist.config.schema import RunConfig

MAX_NEW_TOKENS, TEMPERATURE = 256, 0.0               # as in conf/config.yaml
AGAINST, TIMEOUT_SECONDS = "before", 600.0
FEWEST_PROMPTS = 4                                   # below which a mean over answers has no interval to speak of
# as the hub's own rule: letters, digits, "_", "-" and ".", no two "-" or "." in a row, none at an end
_HUB_NAME = re.compile(r"\w+(?:[-.]\w+|_)*/(?=.{1,96}$)\w+(?:[-.]\w+|_)*")


def validate_outputs(c: RunConfig) -> None:
    """Raises UserError for keys of this kind that contradict each other, or would do nothing."""
    _validate_best(c)
    _validate_samples(c)
    _validate_guard(c)
    _validate_judge(c)
    _validate_harness(c)
    name = c.export.push_to_hub
    if name is None:
        return
    if not _HUB_NAME.fullmatch(name) or name.endswith(".git"):
        raise UserError(f"export.push_to_hub={name} is no name of a model on the hub; write owner/name, of letters, "
                        "digits, '-', '_' and '.'")
    if c.run.offline:
        raise UserError(f"export.push_to_hub={name} needs the network; set run.offline=false")


def _validate_best(c: RunConfig) -> None:
    metric = c.train.keep_best
    if metric is None:
        return
    if metric not in OBJECTIVES:
        raise UserError(f"train.keep_best={metric} is not allowed: {nearest(metric, OBJECTIVES)}")
    if not _holds_out(c):
        raise UserError(f"train.keep_best={metric} is measured on held-out pairs, and there are none; set data.eval or "
                        "data.eval_fraction=0.05")
    if metric.startswith("rewards/") and not c.loss.uses_rejected:
        raise UserError(f"train.keep_best={metric} is not measured with loss.name={c.loss.name}, which implies no "
                        "rewards; set train.keep_best=loss")


def _validate_samples(c: RunConfig) -> None:
    samples = c.eval
    if samples.samples and not _holds_out(c):
        raise UserError(f"eval.samples={samples.samples} answers held-out prompts, and there are none; set data.eval "
                        "or data.eval_fraction=0.05")
    for key, default in (("max_new_tokens", MAX_NEW_TOKENS), ("temperature", TEMPERATURE)):
        if not samples.samples and getattr(samples, key) != default:
            raise UserError(f"eval.{key}={getattr(samples, key)} would do nothing: eval.samples=0; remove it, or set "
                            "eval.samples=8")


def _validate_guard(c: RunConfig) -> None:
    """A guard that is to stop the run must have something to look at. The default, warn, looks where it can."""
    sees_pairs = c.loss.uses_rejected and (c.loss.needs_reference or _holds_out(c))
    if c.guard.on_displacement == "stop" and not sees_pairs:
        why = ("without a reference it follows held-out pairs, and there are none; set data.eval or "
               "data.eval_fraction=0.05" if c.loss.uses_rejected else "it has no rewards; remove it")
        raise UserError(f"guard.on_displacement=stop has nothing to look at with loss.name={c.loss.name}: {why}")
    for name in ("on_length", "on_repetition"):
        if getattr(c.guard, name) == "stop" and c.eval.samples < FEWEST_PROMPTS:
            raise UserError(f"guard.{name}=stop has too little to look at: eval.samples={c.eval.samples}; set "
                            f"eval.samples=32 ({FEWEST_PROMPTS} or more), or guard.{name}=warn")


def _validate_judge(c: RunConfig) -> None:
    judge = c.eval.judge
    if judge.command is not None and judge.url is not None:
        raise UserError(f"eval.judge.command={list(judge.command)} and eval.judge.url={judge.url} are both set; keep "
                        "one of them")
    if judge.url is not None and not re.match(r"https?://[^/]", judge.url):
        raise UserError(f"eval.judge.url={judge.url} must start with http:// or https://, and name a server")
    if judge.command == ():
        raise UserError("eval.judge.command=[] names no program; set eval.judge.command=[python,judge.py]")
    if judge.is_asked and not c.eval.samples:
        raise UserError(f"{judge.key} would do nothing: eval.samples=0; "
                        "set eval.samples=64, the answers that it compares")
    for key, default in (("against", AGAINST), ("timeout_seconds", TIMEOUT_SECONDS)):
        if not judge.is_asked and getattr(judge, key) != default:
            raise UserError(f"eval.judge.{key}={getattr(judge, key)} would do nothing: there is no judge; remove it, "
                            "or set eval.judge.command")


def _validate_harness(c: RunConfig) -> None:
    harness = c.eval.harness
    if harness.tasks and not c.export.merged:
        raise UserError(f"eval.harness.tasks={list(harness.tasks)} needs <run.dir>/model, which export.what="
                        f"{c.export.what} does not write; set export.what=both")
    for key in ("path", "python", "arguments"):
        if not harness.tasks and getattr(harness, key):
            raise UserError(f"eval.harness.{key}={getattr(harness, key)} would do nothing: eval.harness.tasks=[]; "
                            "remove it, or name tasks")


def _holds_out(c: RunConfig) -> bool:
    return bool(c.data.eval or c.data.eval_fraction)
