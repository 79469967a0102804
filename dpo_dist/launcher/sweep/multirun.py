"""`dpo-dist run -m`: Hydra's sweeper proposes jobs, all at once or in rounds; here they are run and compared."""
from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override

from dpo_dist.config.compose import choices, compose, conf_dir, parsed_for_sweep, with_groups
from dpo_dist.config.errors import UserError, nearest, one_line
from dpo_dist.config.objectives import OBJECTIVES
from dpo_dist.config.secrets import refuse_secret_words
from dpo_dist.config.words import quoted
from dpo_dist.launcher.clusters import sweep_launcher_of
from dpo_dist.launcher.sweep.groups import (
    Job,
    check_comparable,
    check_distinct,
    group_jobs,
    key_of,
    make_job,
    sweep_folder,
)
from dpo_dist.launcher.sweep.results import Result, best, command_of, read_result, table, write_results
from dpo_dist.runtime.run_dir import make_for

MOST_JOBS = 2_000                            # each is composed twice before the first is run


def multirun(words: Sequence[str], dry_run: bool = False) -> int:
    """Exit code: 0 where every job is done, 1 where one is not. UserError for a bad value, before anything is started.

    dry_run: prints what would be submitted to Slurm for the sweeper's first jobs, and ends there.
    """
    refuse_secret_words(words)
    words = [_sweep_choice(word) if key_of(word) == "sweep" else word for word in words]
    overrides = parsed_for_sweep(words)
    swept = [o.get_key_element() for o in overrides if o.is_sweep_override()]
    for key in swept:
        if key.startswith(("run.", "cluster", "hydra")):
            raise UserError(f"{key} cannot be swept: it does not say what is trained; give it one value")
    if not swept and not any(key_of(word).startswith(("+sweep", "hydra.sweeper", "hydra/sweeper")) for word in words):
        raise UserError("-m without a key of several values sweeps nothing; write, for instance, "
                        "loss.beta=0.05,0.1,0.3 or sweep=beta_lr")
    given = {o.get_key_element(): o.value() for o in overrides if not o.is_sweep_override()}
    folder = Path(str(given.get("run.dir")
                      or sweep_folder(words, [*swept, *([str(given["+sweep"])] if "+sweep" in given else [])])))
    compose_each(overrides)                             # Hydra composes every job twice before it hands over the first
    # Hydra knows a user's own experiment file by another name
    as_written = dict(zip(with_groups(words), words, strict=True))
    sweep = Sweep(folder, tuple(given), dry_run, as_written)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            # kept beyond the context: composing a job opens another one
            hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        # our launcher calls it for whole batches, not as Hydra calls a task
        run_jobs: Any = sweep.run_jobs
        hydra.multirun("config", run_jobs, ["hydra/launcher=dpo_dist", f"hydra.sweep.dir={quoted(str(folder))}",
                                            *with_groups(words)], with_log_configuration=False)
    except UserError:
        raise
    except _Shown as shown:
        print(shown)
        return 0
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on with what is missing")
        return 130
    except Exception as error:
        if not sweep.began:
            raise _not_begun(words, error) from error
        if not sweep.ended_badly:
            raise
        # Optuna's own, after its limit of failures; the table is still shown
        print(f"sweep: the sweeper gave up: {error}")
    return sweep.report()


def _not_begun(words: Sequence[str], error: Exception) -> UserError:
    """What is said where the sweeper proposed no job: Hydra and its sweepers raise much for values of their keys."""
    if any("optuna" in word for word in words) and not find_spec("hydra_plugins.hydra_optuna_sweeper"):
        return UserError("the Optuna sweeper is not installed; run: pip install 'dpo-dist[sweep]'")
    why = one_line(next(iter(str(error).splitlines()), "")) or type(error).__name__
    return UserError(f"the sweep cannot be started: {why}; look at its keys of hydra")


class _Shown(Exception):
    """Ends a dry run. Its text is what would be submitted."""


class Sweep:
    """The jobs of one command, as Hydra's sweeper proposes them. `run_jobs` goes through Hydra as its task function."""

    def __init__(self, folder: Path, fixed: Sequence[str], dry_run: bool, as_written: Mapping[str, str]):
        self._folder, self._fixed, self._dry_run, self._as_written = folder, fixed, dry_run, as_written
        self._results: dict[Path, Result] = {}
        self._objective = ""
        self.began = False                   # the sweeper proposed jobs

    @property
    def ended_badly(self) -> bool:
        return any(not r.done for r in self._results.values())

    def run_jobs(self, job_overrides: Sequence[Sequence[str]], objective: str, sweeper: Any) -> list[float | Exception]:
        """The objective of each job, in turn; the exception that says why where there is none."""
        self.began = True
        _check_objective(objective, sweeper)
        self._objective = objective
        jobs = [make_job([self._as_written.get(word, word) for word in overrides], self._fixed, self._folder)
                for overrides in job_overrides]
        for job in jobs:
            check_comparable(job.config, objective)
        check_distinct([*(r.job for r in self._all), *jobs])
        distinct = list({job.run_dir: job for job in jobs}.values())     # a sampler may propose the same values twice
        missing = [job for job in distinct if not job.is_done()]
        launcher = sweep_launcher_of(jobs[0].config)
        if self._dry_run:
            raise _Shown(launcher.rendered(group_jobs(missing, self._folder)) if missing else "all jobs are done")
        print(f"sweep: {len(distinct)} jobs in {self._folder}; {len(distinct) - len(missing)} are done, {len(missing)} "
              "to run", flush=True)
        make_for(self._folder, jobs[0].config.run.readable_by)
        why_not: dict[Path, str] = {}
        try:
            if missing:
                why_not = launcher.run_groups(group_jobs(missing, self._folder))
        finally:
            self._results.update({job.run_dir: read_result(job, why_not.get(job.run_dir, "")) for job in distinct})
            write_results(self._folder, self._all, objective)
        return [self._outcome(job) for job in jobs]

    def report(self) -> int:
        """Shows the table and the best job, and writes report.html; the command's exit code."""
        results, chosen = self._all, best(self._all, self._objective)
        print(f"\n{table(results)}\n")
        failed = [r for r in results if not r.done]
        for r in failed:
            print(f"failed: {r.job.name}: {r.message}")
        if chosen:
            print(f"best by held-out {self._objective}: {chosen.job.name}\n  {command_of(chosen.job)}\n  its model: "
                  f"{chosen.job.run_dir}/model")
        has_report = subprocess.run([sys.executable, "-m", "dpo_dist.report", self._folder],
                                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
        print(f"{self._folder}/{'report.html and ' * has_report}sweep.json hold{'' if has_report else 's'} all of it")
        return 1 if failed else 0

    @property
    def _all(self) -> list[Result]:
        return list(self._results.values())

    def _outcome(self, job: Job) -> float | Exception:
        result = self._results[job.run_dir]
        value = result.metrics.get(self._objective, math.nan)
        if not result.done:
            return RuntimeError(result.message)
        return value if math.isfinite(value) else RuntimeError(f"held-out {self._objective} is {value}")


def _check_objective(objective: str, sweeper: Any) -> None:
    if objective not in OBJECTIVES:
        raise UserError(f"hydra.launcher.objective={objective} is not allowed: {nearest(objective, OBJECTIVES)}")
    direction = sweeper.get("direction")
    name = getattr(direction, "name", direction)
    if name not in (None, OBJECTIVES[objective]):
        raise UserError(f"hydra.sweeper.direction={name} is the wrong way for hydra.launcher.objective={objective}; "
                        f"set hydra.sweeper.direction={OBJECTIVES[objective]}")


def _sweep_choice(word: str) -> str:
    choice, valid = word.partition("=")[2], choices("sweep")
    if choice not in valid:
        raise UserError(f"sweep={choice} is not a choice: {nearest(choice, valid)}")
    return f"+{word}"


def compose_each(overrides: Sequence[Override]) -> None:
    """UserError for the first job of a grid that is wrong, and for a grid of too many."""
    ours = [o for o in overrides if not o.get_key_element().lstrip("+~").startswith(("hydra", "sweep"))]
    if all(not o.is_sweep_override() or o.is_discrete_sweep() for o in ours):
        values = [_values(o) if o.is_sweep_override() else [str(o.input_line)] for o in ours]
        if (jobs := math.prod(map(len, values))) > MOST_JOBS:
            raise UserError(f"-m with these values is a sweep of {jobs:,} runs or more, and {MOST_JOBS:,} are the "
                            "most; give fewer values, or let sweep=optuna choose among them")
        for job in itertools.product(*values):
            compose(job)


def _values(swept: Override) -> list[str]:
    """The override with each of its values, as far as so many may be run."""
    named = one_line(str(swept.input_line))
    try:
        texts = list(itertools.islice(swept.sweep_string_iterator(), MOST_JOBS + 1))
    except Exception as error:               # Hydra's and Python's, of a step of 0 and the like
        raise UserError(f"'{named}' cannot be swept: {one_line(str(error))}; write the values one by one, as in 0.1,0.3"
                        ) from error
    if not texts:
        raise UserError(f"'{named}' has no value; write the values one by one, as in 0.1,0.3")
    return [f"{swept.get_key_element()}={text}" for text in texts]
