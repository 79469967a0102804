"""Where a run's numbers go: always to <run.dir>/metrics.jsonl, and a copy where `tracking` says. Only rank 0 writes.
Answers to held-out prompts (eval.samples) go to <run.dir>/samples.jsonl likewise.

A row is {"step": 12, "split": "train", "loss": 0.61, "rewards/chosen": 0.2, ...}. W&B and TensorBoard show a value as
`train/rewards/chosen` against the step. Values that JSON has no number for stand in metrics.jsonl as the strings "nan",
"inf" and "-inf", which Python's float() reads.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

MetricsRow = Mapping[str, Any]
SampleRow = Mapping[str, Any]                # of samples.jsonl: step, prompt, completion, tokens, ended


class Tracker(Protocol):
    def log(self, row: MetricsRow) -> None:
        """Keeps one row: `step`, `split` and numbers. After it returns, the row survives a kill and a power cut."""

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Keeps the answers of one evaluation, in place of any that were kept for this step or later ones."""

    def finish(self, summary: MetricsRow) -> None:
        """Keeps the run's last numbers, if there are any, and closes."""


def named_by_split(row: MetricsRow) -> dict[str, Any]:
    """The row's values as W&B and TensorBoard show them: {"train/loss": ...}."""
    return {f"{row['split']}/{key}": value for key, value in row.items() if key not in ("step", "split")}
