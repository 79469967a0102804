"""tracking=mlflow: a copy of the rows in MLflow, on a server or as files in the run's folder."""
from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking import MlflowConfig
from dpo_dist.run.tracking import MetricsRow, SampleRow, named_by_split
from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")            # read at import; else it calls home
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")             # it prefers databases, which need more packages
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")        # 7 would hold a step for minutes

try:
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
except ImportError as error:
    raise UserError(f"tracking=mlflow needs MLflow, which is not installed here ({error}); run: pip install "
                    "'dpo-dist[mlflow]', or set tracking=none") from error

UNKNOWN_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
PARAMS_AT_ONCE, PARAM_CHARACTERS = 100, 6000                          # what one call may hold


def open_tracker(config: RunConfig, run_dir: Path, resumed_step: int) -> Mlflow:
    return Mlflow(config, RunDir(run_dir))


class Mlflow:
    """An MLflow run whose id is kept in <run.dir>/mlflow_id, so that a resumed run goes on in the same place. It is
    only a copy: a step that is made again after a resume has two points there."""

    def __init__(self, config: RunConfig, run_dir: RunDir):
        t, self._failed = config.tracking, False
        assert isinstance(t, MlflowConfig)
        uri = t.uri or run_dir.mlflow.resolve().as_uri()
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._id = self._resumed(run_dir) or self._new(config, t.experiment, run_dir)
        except Exception as error:                       # its file store reads YAML, and raises what that raises
            what = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"tracking.uri={t.uri}: MLflow could not start ({what}); give the "
                            "address of a server that can be reached, or tracking.uri=null for files in the run's "
                            "folder") from error

    def log(self, row: MetricsRow) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, row["step"]) for name, value in named_by_split(row).items()]
        self._copy(lambda: self._client.log_batch(self._id, metrics=metrics))

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        text = json.dumps(list(rows), indent=2, ensure_ascii=False)
        self._copy(lambda: self._client.log_text(self._id, text, f"samples/step-{step:06d}.json"))

    def finish(self, summary: MetricsRow) -> None:
        """A run that ends without a summary was stopped, and will go on."""
        self._copy(lambda: self._client.set_terminated(self._id, "FINISHED" if summary else "KILLED"))

    def _copy(self, work: Callable[[], object]) -> None:
        """Does the work. Where MLflow fails, its copy ends there: training neither fails nor waits for it again."""
        if self._failed:
            return
        try:
            work()
        except Exception as error:                       # its file store raises that kind itself
            self._failed = True
            log.warning("MLflow failed, so its copy of this run ends here; metrics.jsonl goes on: %s", error)

    def _resumed(self, run_dir: RunDir) -> str | None:
        if not run_dir.mlflow_id.exists():
            return None
        known = run_dir.mlflow_id.read_text(errors="replace")
        try:
            self._client.update_run(known, status="RUNNING")
            return known
        except MlflowException as error:
            if error.error_code not in UNKNOWN_RUN:      # else the file is damaged, or the run was deleted
                raise
            log.warning("MLflow has no run '%s' (%s); its copy of this run goes on in a new one", known, error)
            return None

    def _new(self, config: RunConfig, experiment: str, run_dir: RunDir) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        made = str(self._client.create_run(number, run_name=run_dir.path.resolve().name).info.run_id)
        params = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in _flat(to_dict(config))]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(made, params=params[first:first + PARAMS_AT_ONCE])
        write_atomic(run_dir.mlflow_id, made)
        return made


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
