"""The data sets, read once by as many processes as they are worth: each writes down the facts of its share of the rows.

Rows that a run would refuse are counted here, with where they stand and why; an audit goes on.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dpo_dist.audit.facts import BENCHMARK, BOTH_BAD, HELD_OUT, TIE, TRAIN, Facts
from dpo_dist.audit.look import Looker
from dpo_dist.audit.texts import marks_pattern, said
from dpo_dist.audit.tokens import CHARS_LOOKED_AT, ROWS_LOOKED_AT, Sample, TokenFacts, look_at_tokens
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig, RunConfig
from dpo_dist.data.columns import Columns, check_seen, named
from dpo_dist.data.fields import Fields, Unfit
from dpo_dist.data.files import read_records
from dpo_dist.data.formats import FORMATS
from dpo_dist.data.messages import turns_of
from dpo_dist.data.outcomes import Ties
from dpo_dist.data.prepare import data_sets
from dpo_dist.data.records import Record
from dpo_dist.data.rows import OVER_CAP, Entry, Plan, ReadReport, Share, entries, plan_reading, rows_of
from dpo_dist.data.sample import sampled
from dpo_dist.data.templates import PLAIN

IDENTICAL = "chosen and rejected are identical"
# fields that hold a benchmark's prompt, of several the first
PROMPTS = ("prompt", "instruction", "question", "problem", "input", "query", "goal", "text", "messages",
           "conversations", "context", "turns")


@dataclass(frozen=True)
class Source:
    """A data set, and what it is for."""

    config: DatasetConfig
    split: int                               # TRAIN, HELD_OUT or BENCHMARK
    key: str                                 # for messages: data.train[0]

    @property
    def name(self) -> str:
        return self.config.name or self.config.path


def sources_of(config: RunConfig) -> list[Source]:
    """All that is read, in order."""
    ours = [Source(entry.config, TRAIN if entry.split == "train" else HELD_OUT, f"data.{entry.split}[{entry.source}]")
            for entry in data_sets(config.data)]
    return ours + [Source(entry, BENCHMARK, f"audit.against[{at}]") for at, entry in enumerate(config.audit.against)]


@dataclass
class Read:
    """What a share of all data sets gave."""

    chunks: list[tuple[int, int, Facts]] = field(default_factory=list)           # (data set, chunk, its facts)
    reports: list[ReadReport] = field(default_factory=list)                      # one a data set
    identical: list[str] = field(default_factory=list)                           # where
    tokens: TokenFacts = field(default_factory=TokenFacts)

    def join(self, other: Read) -> None:
        """Adds another share of the same data sets."""
        self.chunks += other.chunks
        for mine, theirs in zip(self.reports, other.reports, strict=True):
            mine.join(theirs)
        self.identical += other.identical
        self.tokens.join(other.tokens)

    def facts(self) -> Facts:
        """Of all pairs, as they stand."""
        return Facts.joined([facts for _, _, facts in sorted(self.chunks, key=lambda chunk: chunk[:2])])


def read_share(config: RunConfig, tokenizer: Any | None, share: Share, tell: Callable[[int], None]) -> Read:
    """Reads a share of all data sets; `tell` is told how many records are done, now and then. Raises UserError."""
    read = Read()
    rendered = config.data.chat_template == PLAIN or getattr(tokenizer, "chat_template", None) is None
    marks = marks_pattern(getattr(tokenizer, "all_special_tokens", []), rendered)
    sample = Sample(ROWS_LOOKED_AT // share.parts, CHARS_LOOKED_AT // share.parts)
    done = 0
    for number, source in enumerate(sources_of(config)):
        report = ReadReport.of(source.config)
        read.reports.append(report)
        for chunk, fresh, plan in (_benchmark(source, share) if source.split == BENCHMARK else
                                   _chunks(source.config, config.data.ties, share, report)):
            looker = Looker(marks)
            for at, (place, entry) in enumerate(fresh):
                if plan is None:
                    _take_prompt(entry, looker, source, report)
                else:
                    read.identical += _take(entry, place, plan, config.data.ties, looker, source, number, report,
                                            sample)
                if at % 64 == 63:
                    tell(done + at)
            done += len(fresh)
            tell(done)
            read.chunks.append((number, chunk, looker.writer.facts()))
    read.tokens = look_at_tokens(sample.rows(), tokenizer, config.data, lambda tokenized: tell(done + tokenized))
    read.tokens.left = sample.seen - read.tokens.looked_at
    return read


Fresh = list[tuple[int, Entry]]              # entries with their places in the data set


def _chunks(dataset: DatasetConfig, ties: Ties, share: Share, report: ReadReport) -> Iterator[tuple[int, Fresh, Plan]]:
    """(number, entries, how they are read) of the chunks of a share, as data/rows.py's read_chunks cuts them."""
    plan, columns = plan_reading(dataset, ties), Columns(dataset.columns)
    form = FORMATS[plan.format]
    report.format = plan.format
    takes_all = form.group is not None or plan.limit is not None

    def wanted(record: int) -> bool:
        return takes_all or share.has(record // share.records)

    numbered = enumerate(sampled(entries(dataset, form, columns, wanted), plan.limit))
    for number, group in groupby(numbered, lambda entry: entry[0] // share.records):
        if share.has(number):
            fresh = [(place, entry) for place, entry in group if entry is not None]
            report.unseen = sorted(columns.unseen)
            yield number, fresh, plan


def _benchmark(source: Source, share: Share) -> Iterator[tuple[int, Fresh, None]]:
    """As _chunks: of a benchmark's file only the prompts are wanted, so rows need not be pairs."""
    columns = Columns(source.config.columns)
    records = enumerate(named(read_records(source.config, lambda record: share.has(record // share.records)), columns))
    for number, group in groupby(records, lambda entry: entry[0] // share.records):
        fresh: Fresh = [(place, record) for place, record in group if record is not None]
        if share.has(number):
            yield number, fresh, None
    check_seen(columns.unseen if share.parts == 1 else (), source.config.path)


def _take(found: Entry, place: int, plan: Plan, ties: Ties, looker: Looker, source: Source, number: int,
          report: ReadReport, sample: Sample) -> list[str]:
    """Writes the entry's rows down; a place for each that is refused because its answers are identical."""
    dropped, both_bad = report.ties - report.kept_ties, report.both_bad
    identical = report.bad.counts.get(IDENTICAL, 0)
    where, fields = (found.where, found.value) if isinstance(found, Record) else (getattr(found, "where", ""), {})
    for at, row in enumerate(rows_of(found, FORMATS[plan.format], report, ties)):
        if plan.cap is not None and not plan.cap.takes(row, (place, at)):
            report.leave_out(row, OVER_CAP)
            continue
        prompt, content = looker.look(row, fields, report.format, number, source.split)
        sample.offer(content, row, prompt)
    dropped = report.ties - report.kept_ties - dropped
    bad = report.both_bad - both_bad if dropped else 0               # kept ones are among the rows
    looker.writer.ties += [(where, BOTH_BAD)] * bad + [(where, TIE)] * (dropped - bad)
    return [where] * (report.bad.counts.get(IDENTICAL, 0) - identical)


def _take_prompt(record: Entry, looker: Looker, source: Source, report: ReadReport) -> None:
    report.rows += 1
    if not isinstance(record, Record):
        report.bad.add(record.reason, str(record))
        return
    text = prompt_of(record.value)
    if text is None:
        raise UserError(f"{record.where}: {source.key} has no prompt (fields: {', '.join(record.value)}); name its "
                        f"column, as in audit.against=[{{path: {source.config.path}, columns: {{prompt: my_column}}}}]")
    looker.look_at_prompt(text, record.where, source.split)


def prompt_of(fields: Fields) -> str | None:
    """The prompt in a record of whatever shape; None where there is none."""
    for key in PROMPTS:
        value = fields.get(key)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value:
            if isinstance(value[0], str):                            # MT-Bench's turns
                return value[0]
            try:
                turns = turns_of(value, key, "user")
            except Unfit:
                continue
            asked = [turn for turn in turns if turn["role"] != "assistant"]
            return said(tuple(turns[:turns.index(asked[-1]) + 1])) if asked else None
    return None
