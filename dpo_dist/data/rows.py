"""A data set's records → checked rows, streamed in chunks, with a report of what became of them.

A record that does not fit its format (formats/) is a bad row, with file, line and reason: an error, or left out and
counted (data.on_bad_row).
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.columns import Columns, check_seen, named
from dpo_dist.data.fields import Fields, Unfit
from dpo_dist.data.files import Wanted, read_records
from dpo_dist.data.formats import FORMATS, DataRow, Format, NoPair, Tie
from dpo_dist.data.outcomes import Ties, checked, outcomes
from dpo_dist.data.records import BadRow, Record
from dpo_dist.data.sample import Place, PromptCap, Threshold, prompt_cap, sampled, threshold
from dpo_dist.types import TieKind

EXAMPLES_PER_REASON = 3
OVER_CAP = "beyond pairs_per_prompt of its prompt"
Entry = Record | BadRow | NoPair             # what a data set consists of, before its rows are read
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
    ties: int = 0                            # pairs of which neither is better, counted whether they are kept or not
    both_bad: int = 0                        # those of them that the data calls bad both
    kept_ties: int = 0                       # those of them that are among `pairs` (data.ties=keep)
    no_pair: dict[str, int] = field(default_factory=dict)            # sound rows that give no pair, by reason
    bad: Tally = field(default_factory=Tally)
    unseen: list[str] | None = None          # columns of data.train[].columns that no row had; None: no row was read

    @staticmethod
    def of(dataset: DatasetConfig, form: str | None = None) -> ReadReport:
        """An empty report."""
        return ReadReport(dataset.name or dataset.path, form or dataset.format)

    def join(self, later: ReadReport) -> None:
        """Adds what became of later rows."""
        self.format = later.format
        for name in ("rows", "pairs", "ties", "both_bad", "kept_ties"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for reason, n in later.no_pair.items():
            self.no_pair[reason] = self.no_pair.get(reason, 0) + n
        self.bad.join(later.bad)
        if later.unseen is not None:
            self.unseen = [c for c in later.unseen if self.unseen is None or c in self.unseen]

    def count_tie(self, kind: TieKind, kept: bool) -> None:
        self.ties, self.both_bad, self.kept_ties = (
            self.ties + 1, self.both_bad + (kind == "both_bad"), self.kept_ties + kept)

    def leave_out(self, row: DataRow, reason: str) -> None:
        """Counts a row that was counted as a pair as none."""
        self.pairs, self.kept_ties = self.pairs - 1, self.kept_ties - bool(row.tie)
        self.no_pair[reason] = self.no_pair.get(reason, 0) + 1

    def check(self, dataset: DatasetConfig, on_bad_row: OnBadRow) -> None:
        """UserError for a data set without rows, and for bad rows unless `on_bad_row` is skip."""
        if not self.rows:
            raise UserError(f"data path '{dataset.path}' has no rows; give a file with rows, or remove it")
        check_seen(self.unseen or (), dataset.path)
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


# ------------------------------------------------------------------------------------------ what is decided beforehand


@dataclass(frozen=True)
class Plan:
    """How a data set's rows are read: what has to be known of all of it before the first row is."""

    format: str
    limit: Threshold | None = None           # which records data.train[].rows takes; None = all
    cap: PromptCap | None = None             # which pairs data.train[].pairs_per_prompt takes; None = all


def plan_reading(dataset: DatasetConfig, ties: Ties = "drop") -> Plan:
    """The format of a data set, and which of its records and pairs are taken. Goes through the files once for `rows`,
    once more for `pairs_per_prompt`, and as far as the first row that fits for `auto`. Raises UserError."""
    columns = Columns(dataset.columns)
    form: str = dataset.format
    if form == "auto":
        form = told_format(named(read_records(dataset), columns), columns, dataset.path)
    limit = None
    if dataset.rows is not None:
        limit = threshold(entries(dataset, FORMATS[form], Columns(dataset.columns)), dataset.rows)
    cap = None
    if dataset.pairs_per_prompt is not None:
        taken = sampled(entries(dataset, FORMATS[form], Columns(dataset.columns)), limit)
        cap = prompt_cap(_placed_rows(taken, FORMATS[form], ties), dataset.pairs_per_prompt)
    return Plan(form, limit, cap)


def _placed_rows(taken: Iterator[Entry | None], form: Format, ties: Ties) -> Iterator[tuple[DataRow, Place]]:
    uncounted = ReadReport("", "")
    for number, entry in enumerate(taken):
        assert entry is not None, "all are wanted"
        yield from ((row, (number, at)) for at, row in enumerate(rows_of(entry, form, uncounted, ties)))


def told_format(records: Iterator[Record | BadRow | None], columns: Columns, path: str) -> str:
    """The format of the first row that fits one; rows before it that fit none are bad rows like any other.

    Of the formats whose fields a row has, the first that can read it. If no row can be read, the first whose fields
    some row has, so that what is wrong with the rows is said. Raises UserError where there is none.
    """
    likely, first = None, None
    for record in records:
        if not isinstance(record, Record):
            continue
        first = first or record
        candidates = [name for name, entry in FORMATS.items() if entry.fits(record.value)]
        for name in candidates:
            gives = _gives(FORMATS[name], record.value)
            if gives == "a judgment":
                return name
            if gives == "none":              # of this format, but not enough to tell it from the others
                break
        likely = likely or next(iter(candidates), None)
    check_seen(columns.unseen, path)
    if likely:
        return likely
    if first is None:
        return "preference"                  # no row at all: whatever is wrong is said when they are read
    known = "".join(f"\n  {name}: {entry.needs}" for name, entry in FORMATS.items())
    raise UserError(f"{first.where}: no format fits the fields {', '.join(first.value) or '(none)'}, and none fits a "
                    "later row; name your columns in its data entry, as in data.train=[{path: ..., columns: {prompt: "
                    f"question, chosen: good, rejected: bad}}}}]. The formats and what they need:{known}")


def _gives(form: Format, fields: Fields) -> Literal["a judgment", "none", "bad"]:
    if form.group:
        return "a judgment"
    try:
        found = [outcome if isinstance(outcome, NoPair | Tie) else checked(outcome)
                 for outcome in form.read(fields, "", "")]
    except Unfit:
        return "bad"
    return "none" if all(isinstance(outcome, NoPair) for outcome in found) else "a judgment"


# ----------------------------------------------------------------------------------------------------- reading the rows


def read_rows(dataset: DatasetConfig, on_bad_row: OnBadRow, ties: Ties = "drop") -> tuple[Iterator[DataRow],
                                                                                         ReadReport]:
    """The rows of a data set, streamed, and a report that fills up as they are consumed.

    Raises UserError (from the iterator) for files that cannot be read, for a format that cannot be told, and, once all
    rows have been looked at, for bad rows unless `on_bad_row` is skip.
    """
    report = ReadReport.of(dataset)
    return _read(dataset, on_bad_row, ties, report), report


def _read(dataset: DatasetConfig, on_bad_row: OnBadRow, ties: Ties, report: ReadReport) -> Iterator[DataRow]:
    for chunk in read_chunks(dataset, on_bad_row, Share(records=1), ties):
        report.join(chunk.report)
        yield from chunk.rows
    report.check(dataset, on_bad_row)


def read_chunks(dataset: DatasetConfig, on_bad_row: OnBadRow, share: Share, ties: Ties = "drop") -> Iterator[Chunk]:
    """The chunks of a share of a data set. Unless `on_bad_row` is skip, a chunk with a bad row and those after it have
    no rows, only reports: ReadReport.check raises the error once all bad rows are counted. ties: whether rows of which
    neither answer is better are among the rows (data.ties)."""
    plan, columns = plan_reading(dataset, ties), Columns(dataset.columns)
    form = FORMATS[plan.format]
    # pairs that are made of several records, and samples, depend on records of all shares
    takes_all = form.group is not None or plan.limit is not None

    def wanted(record: int) -> bool:
        return takes_all or share.has(record // share.records)

    found_bad = False
    numbered = enumerate(sampled(entries(dataset, form, columns, wanted), plan.limit))
    for number, group in groupby(numbered, lambda entry: entry[0] // share.records):
        if not share.has(number):
            continue
        chunk = Chunk(number, [], ReadReport.of(dataset, plan.format))
        for place, entry in group:
            assert entry is not None, "every entry of an own chunk is wanted"
            for at, row in enumerate(rows_of(entry, form, chunk.report, ties)):
                if plan.cap is None or plan.cap.takes(row, (place, at)):
                    chunk.rows.append(row)
                else:
                    chunk.report.leave_out(row, OVER_CAP)
        chunk.report.unseen = sorted(columns.unseen)
        found_bad = found_bad or (on_bad_row == "error" and bool(chunk.report.bad.counts))
        if found_bad:
            chunk.rows.clear()
        yield chunk


def entries(dataset: DatasetConfig, form: Format, columns: Columns,
            wanted: Wanted = lambda number: True) -> Iterator[Entry | None]:
    """The records of a data set under the names that formats know, grouped as the format asks for; None for each that
    is not wanted."""
    records = named(read_records(dataset, wanted), columns)
    return form.group(record for record in records if record is not None) if form.group else records


def rows_of(entry: Entry, form: Format, report: ReadReport, ties: Ties = "drop") -> Iterator[DataRow]:
    """The rows that an entry gives; what else becomes of it is counted in the report."""
    report.rows += entry.rows if isinstance(entry, Record) else 1
    for outcome in outcomes(entry, form, report.source, ties) if isinstance(entry, Record) else (entry,):
        if isinstance(outcome, NoPair):
            report.no_pair[outcome.reason] = report.no_pair.get(outcome.reason, 0) + 1
        elif isinstance(outcome, BadRow):
            report.bad.add(outcome.reason, str(outcome))
        elif isinstance(outcome, str):
            report.count_tie(outcome, kept=False)
        else:
            report.pairs += 1
            if outcome.tie:
                report.count_tie(outcome.tie, kept=True)
            yield outcome
