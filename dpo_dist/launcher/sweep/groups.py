"""What a sweep is: overrides → jobs with a folder each; jobs → groups that share reference log-probs. Runs nothing.

A job's folder ends with a digest of what it trains (RunConfig.identity), so a sweep finds its runs again, whatever the
order of its values, how a number was written, or which values and keys were added since.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import TOKENS, VALUES, deciding, to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.words import quoted
from dpo_dist.runtime.run_dir import RunDir

Value = str | float | int | bool | None
# overrides that say how to sweep, and are no part of a job
OF_THE_SWEEP = ("run.dir", "cluster.jobs_at_once", "+sweep")
# overrides that say where and how it runs, not what is trained
NOT_OF_THE_RUN = ("run.", "cluster", "tracking", "zero", "hydra")


@dataclass(frozen=True)
class Job:
    """One training of a sweep."""

    swept: dict[str, Value]              # {key that differs between jobs: its value here}
    words: tuple[str, ...]               # its overrides, without run.dir
    config: RunConfig                    # with its run.dir

    @property
    def overrides(self) -> tuple[str, ...]:
        """What composes `config` in another process."""
        return (*self.words, f"run.dir={quoted(self.config.run_dir)}")

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        return " ".join(f"{key}={shown(value)}" for key, value in self.swept.items())

    def is_done(self) -> bool:
        """True where its folder holds this very run, finished."""
        folder = RunDir(self.run_dir)
        return folder.is_done and folder.holds(self.config.identity_dict())


@dataclass(frozen=True)
class Group:
    """Jobs that need the same reference log-probs. `score`: the first of them, in a folder for scoring; None if not
    needed."""

    jobs: tuple[Job, ...]
    score: Job | None


def sweep_folder(words: Sequence[str], swept: Sequence[str]) -> str:
    """The sweep's folder where run.dir does not set it. It follows from the swept keys and the other words, not the
    values."""
    rest = sorted(word for word in words if not word.lstrip("+~").startswith(NOT_OF_THE_RUN)
                  and key_of(word) not in swept)
    digest = hashlib.sha256(json.dumps([sorted(swept), rest]).encode()).hexdigest()[:8]
    return "-".join(["runs/sweep", *(_short(key) for key in swept), digest])


def make_job(overrides: Sequence[str], fixed: Sequence[str], folder: Path) -> Job:
    """The job that a sweeper proposed; `fixed`: keys that are the same in all jobs. UserError for a bad value."""
    config = compose([word for word in overrides if key_of(word) not in ("run.dir", "+sweep")])
    swept = {key_of(word): _value(config, word) for word in overrides if key_of(word) not in (*fixed, *OF_THE_SWEEP)}
    parts = [f"{_short(key)}_{shown(value)}" for key, value in swept.items()]
    name = re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:100]
    digest = config.identity()[:8]
    job_folder = next(folder.glob(f"*-{digest}"), folder / f"{name}-{digest}")
    return _in(job_folder, Job(swept, tuple(word for word in overrides if key_of(word) not in OF_THE_SWEEP), config))


def group_jobs(jobs: Sequence[Job], folder: Path) -> list[Group]:
    """The jobs grouped by what decides their reference log-probs; those that need no scoring first."""
    groups: dict[str | None, list[Job]] = {}
    for job in jobs:
        groups.setdefault(reference_group(job.config), []).append(job)
    return [Group(tuple(members), None if key is None else _in(folder / f"reference-{key}", members[0]))
            for key, members in sorted(groups.items(), key=lambda item: item[0] or "")]


def audit_of(job: Job) -> Job:
    """The job in whose folder the audit of its data is: the same for all jobs of a sweep with the same data."""
    config = job.config
    decides = {"data": deciding(config.data, TOKENS), "tokenizer": config.model.path, **to_dict(config.audit)}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    return _in(job.run_dir.parent / f"audit-{digest}", job)


def audits_of(jobs: Sequence[Job]) -> list[Job]:
    """The audits of these jobs' data, each once."""
    return list({audit.run_dir: audit for audit in map(audit_of, jobs)}.values())


def reference_group(config: RunConfig) -> str | None:
    """A digest of what decides a run's reference log-probs; None where nothing is scored before training.

    From the config alone, so two names of the same weights are two groups; the second then finds in the cache what the
    first left there.
    """
    if not config.scores_apart:
        return None
    decides = {
        "reference": config.reference_path, "tokenizer": config.model.path, "dtype": config.model.dtype,
        "data": deciding(config.data, TOKENS), "cache": config.reference.cache_dir,
        **({"quantization": bits} if (bits := config.reference_quantization) != "none" else {}),
        **deciding(config.reference, VALUES)}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]


def check_comparable(config: RunConfig, objective: str) -> None:
    """UserError where the runs of a sweep could not share their reference, be compared on held-out pairs, or keep
    their models apart."""
    if config.export.push_to_hub:
        raise UserError(f"export.push_to_hub={config.export.push_to_hub}: the runs of a sweep would overwrite each "
                        "other's model there; leave it out, and upload the best run's with dpo-dist export")
    if config.reference.mode == "ahead":
        raise UserError("reference.mode=ahead is for a single run; the runs of a sweep share what is scored first: set "
                        "reference.mode=cached")
    if not config.data.eval and not config.data.eval_fraction:
        raise UserError("data.eval=[] and data.eval_fraction=0 leave no held-out pairs to compare the runs of a sweep "
                        "by; set data.eval_fraction=0.05")
    if objective.startswith("rewards/") and not config.loss.uses_rejected:
        raise UserError(f"hydra.launcher.objective={objective} is not measured with loss.name={config.loss.name}, "
                        "which implies no rewards; set hydra.launcher.objective=loss")


def check_distinct(jobs: Sequence[Job]) -> None:
    """UserError where jobs of different values train the same thing. A sampler may propose the same values twice."""
    first: dict[str, Job] = {}
    for job in jobs:
        other = first.setdefault(job.config.identity(), job)
        for key, value in job.swept.items():
            if value != other.swept.get(key, value):
                raise UserError(f"{key.lstrip('+')} cannot be swept: {other.name} and {job.name} train the same thing, "
                                "as it says where or how a run is computed or followed, not what is trained; give it "
                                "one value")


def key_of(word: str) -> str:
    """The key of an override `key=value`, with its + or ~."""
    return word.split("=", 1)[0]


def shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in(folder: Path, job: Job) -> Job:
    """The job in another folder."""
    run = dataclasses.replace(job.config.run, dir=str(folder))
    return dataclasses.replace(job, config=dataclasses.replace(job.config, run=run))


def _value(config: RunConfig, word: str) -> Value:
    """The value that an override ended up with; its own text where it is no single value (a group's choice, a list)."""
    key, _, text = word.partition("=")
    value: Any = to_dict(config)
    for part in key.lstrip("+").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return text if value is None or isinstance(value, dict | list) else value


def _short(key: str) -> str:
    return key.lstrip("+").rsplit(".", 1)[-1]
