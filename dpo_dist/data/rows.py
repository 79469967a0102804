"""A data set's records → checked rows, streamed in chunks, with a report of what became of them.

A record that does not fit its format (formats.py) is a bad row, with file, line and reason: an error, or left out and
counted (data.on_bad_row).
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.fields import Unfit
from dpo_dist.data.files import BadRow, Record, read_records
from dpo_dist.data.formats import FORMATS, DataRow, detect_format
from dpo_dist.types import PreferenceRow, TokenizedPair

EXAMPLES_PER_REASON = 3
CHUNK_RECORDS = 512                          # tokenized in one call
OnBadRow = Literal["error", "skip"]


@dataclass
class Tally:
    """Counts by reason, with the first few examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append(example)

    def join(self, later: Tally) -> None:
        """Adds what was counted in later rows."""
        for reason, n in later.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + n
            shown = self.examples.setdefault(reason, [])
            shown += later.examples[reason][:EXAMPLES_PER_REASON - len(shown)]


@dataclass
class ReadReport:
    """What became of a data set's rows. Complete once the rows have all been consumed."""

    source: str
    format: str
    rows: int = 0                            # records read
    pairs: int = 0                           # judgments that they gave (one row of ratings may give many)
    ties: int = 0                            # pairs of equally rated responses: no judgment
    bad: Tally = field(default_factory=Tally)

    @staticmethod
    def of(dataset: DatasetConfig, form: str | None = None) -> ReadReport:
        """An empty report."""
        return ReadReport(dataset.name or dataset.path, form or dataset.format)

    def join(self, later: ReadReport) -> None:
        """Adds what became of later rows."""
        self.format = later.format
        self.rows, self.pairs, self.ties = self.rows + later.rows, self.pairs + later.pairs, self.ties + later.ties
        self.bad.join(later.bad)

    def check(self, dataset: DatasetConfig, on_bad_row: OnBadRow) -> None:
        """UserError for a data set without rows, and for bad rows unless `on_bad_row` is skip."""
        if not self.rows:
            raise UserError(f"data path '{dataset.path}' has no rows; give a file with rows, or remove it")
        if on_bad_row == "error" and self.bad.counts:
            shown = "".join(f"\n  {text}" for texts in self.bad.examples.values() for text in texts)
            raise UserError(f"{sum(self.bad.counts.values())} bad row(s) of {self.rows} in '{dataset.path}' (format "
                            f"{self.format}):{shown}\n"
                            "mend them, or set data.on_bad_row=skip to leave them out and count them")


@dataclass(frozen=True)
class Share:
    """Which records of a data set a process reads: of all chunks of so many, every `parts`-th from number `part` on."""

    part: int = 0
    parts: int = 1
    records: int = field(default_factory=lambda: CHUNK_RECORDS)

    def has(self, chunk: int) -> bool:
        return chunk % self.parts == self.part


@dataclass(frozen=True)
class Chunk:
    """Some consecutive records: the rows that they gave, and what became of them."""

    number: int
    rows: list[DataRow]
    report: ReadReport


def read_rows(dataset: DatasetConfig, on_bad_row: OnBadRow) -> tuple[Iterator[DataRow], ReadReport]:
    """The rows of a data set, streamed, and a report that fills up as they are consumed.

    Raises UserError (from the iterator) for files that cannot be read, for a format that cannot be told, and, once all
    rows have been looked at, for bad rows unless `on_bad_row` is skip.
    """
    report = ReadReport.of(dataset)
    return _read(dataset, on_bad_row, report), report


def _read(dataset: DatasetConfig, on_bad_row: OnBadRow, report: ReadReport) -> Iterator[DataRow]:
    for chunk in read_chunks(dataset, on_bad_row, Share(records=1)):
        report.join(chunk.report)
        yield from chunk.rows
    report.check(dataset, on_bad_row)


def read_chunks(dataset: DatasetConfig, on_bad_row: OnBadRow, share: Share) -> Iterator[Chunk]:
    """The chunks of a share of a data set. Unless `on_bad_row` is skip, a chunk with a bad row and those after it have
    no rows, only reports: ReadReport.check raises the error once all bad rows are counted."""
    form: str = dataset.format

    def wanted(record: int) -> bool:         # those before the format is told, too: it is the same in every process
        return form == "auto" or share.has(record // share.records)

    found_bad = False
    records = enumerate(read_records(dataset, wanted))
    for number, group in groupby(records, lambda numbered: numbered[0] // share.records):
        chunk = Chunk(number, [], ReadReport.of(dataset, form))
        for _, record in group:
            if record is not None:
                chunk.rows.extend(_rows_of(record, chunk.report))
                form = chunk.report.format
        if share.has(number):
            found_bad = found_bad or (on_bad_row == "error" and bool(chunk.report.bad.counts))
            if found_bad:
                chunk.rows.clear()
            yield chunk


def _rows_of(record: Record | BadRow, report: ReadReport) -> Iterator[DataRow]:
    """The rows that a record gives; what else becomes of it is counted in the report."""
    report.rows += 1
    for outcome in _outcomes(record, report):
        if outcome is None:
            report.ties += 1
        elif isinstance(outcome, BadRow):
            report.bad.add(outcome.reason, str(outcome))
        else:
            report.pairs += 1
            yield outcome


def _outcomes(record: Record | BadRow, report: ReadReport) -> Iterator[DataRow | BadRow | None]:
    """What a record gives: rows, None for a tie, or what is wrong with it."""
    if isinstance(record, BadRow):
        yield record
        return
    try:
        if not isinstance(record.value, dict):
            raise Unfit("the row is not an object with fields", type(record.value).__name__)
        fields = {key: value for key, value in record.value.items() if value is not None}
        if report.format == "auto":
            report.format = detect_format(fields, record.where)
        for row in FORMATS[report.format].read(fields, record.where, report.source):
            try:
                yield row if row is None else _checked(row)
            except Unfit as unfit:           # one pair of a ratings row may be bad, the others good
                yield BadRow(record.where, unfit.reason, unfit.detail)
    except Unfit as unfit:
        yield BadRow(record.where, unfit.reason, unfit.detail)


def _checked(row: DataRow) -> DataRow:
    if isinstance(row, TokenizedPair):
        parts: tuple[Any, ...] = (row.prompt_ids, row.chosen_ids, row.rejected_ids)
    else:
        parts = (row.prompt, row.chosen, row.rejected)
    for name, part in zip(("prompt", "chosen", "rejected"), parts, strict=True):
        ends_empty = isinstance(part, tuple) and name != "prompt" and _is_empty(part[-1:])
        if _is_empty(part) or ends_empty:
            raise Unfit(f"{name} is empty")
    if parts[1] == parts[2]:
        raise Unfit("chosen and rejected are identical")
    if isinstance(row, PreferenceRow) and not isinstance(row.prompt, str):
        if row.prompt[-1]["role"] == "assistant":
            raise Unfit("the prompt ends with an assistant turn")
        for name, turns in (("chosen", row.chosen), ("rejected", row.rejected)):
            assert not isinstance(turns, str), "messages and text do not mix in one row"
            if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
                raise Unfit(f"{name} does not begin and end with an assistant turn",
                            f"roles {', '.join(m['role'] for m in turns)}")
    return row


def _is_empty(part: Any) -> bool:
    if isinstance(part, str):
        return not part.strip()
    if part and isinstance(part[0], dict):
        return not any(m.get("content", "").strip() or m.get("tool_calls") for m in part)
    return not part
