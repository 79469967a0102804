"""tracking=tensorboard: a copy of the rows as event files."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dpo_dist.config.schema import RunConfig
from dpo_dist.run.tracking import MetricsRow, SampleRow, named_by_split
from dpo_dist.runtime.run_dir import RunDir


def open_tracker(config: RunConfig, run_dir: Path, resumed_step: int) -> TensorBoard:
    return TensorBoard(run_dir, resumed_step)


class TensorBoard:
    """Event files in <run.dir>/tensorboard. On a resume TensorBoard is told to forget the steps that are made again."""

    def __init__(self, run_dir: Path, resumed_step: int):
        first_new_step = resumed_step + 1 if resumed_step else 0
        self._writer: Any = SummaryWriter(str(RunDir(run_dir).tensorboard), purge_step=first_new_step)

    def log(self, row: MetricsRow) -> None:
        for name, value in named_by_split(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        for number, row in enumerate(rows):
            text = f"**prompt**\n\n{indented(row['prompt'])}\n\n**completion**\n\n{indented(row['completion'])}"
            self._writer.add_text(f"samples/{number}", text, step)
        self._writer.flush()

    def finish(self, summary: MetricsRow) -> None:
        if summary:
            self._writer.add_text("summary", "\n".join(f"- {name}: {value}" for name, value in summary.items()))
        self._writer.close()


def indented(text: object) -> str:
    """The text as Markdown shows it to the letter."""
    return "\n".join(f"    {line}" for line in str(text).splitlines())
