"""A data set's rows, one after another as they stand in its files, each with what becomes of it: the pair that is
trained on, or why there is none. Nothing is read beyond what is asked for."""
from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data.rows import ReadReport, Share, Tally, read_chunks
from dpo_dist.data.tokenize import Dropped, PairTokenizer, truncate
from dpo_dist.data.writer import hash64
from dpo_dist.types import TokenizedPair

ROWS_LOOKED_AT = 2000                    # among which the longest pair and one at random are found


@dataclass(frozen=True)
class Trained:
    """A pair as it is trained on."""

    pair: TokenizedPair
    whole: TokenizedPair                 # before truncation
    held_out: bool                       # by data.eval_fraction

    @property
    def where(self) -> str:
        return self.pair.where

    @property
    def lost_tokens(self) -> tuple[int, int, int]:
        """Tokens that truncation took from (prompt, chosen, rejected)."""
        lost = [len(getattr(self.whole, ids)) - len(getattr(self.pair, ids))
                for ids in ("prompt_ids", "chosen_ids", "rejected_ids")]
        return lost[0], lost[1], lost[2]


@dataclass(frozen=True)
class NotTrained:
    """A row of which there is no pair."""

    where: str
    reason: str
    detail: str
    bad: bool                            # it does not fit its format; else it was dropped on its way to tokens
    stopped_by: str | None               # the setting that makes a run stop at such a row


Outcome = Trained | NotTrained


def outcomes(dataset: DatasetConfig, config: DataConfig,
             encoder: PairTokenizer) -> tuple[Iterator[Outcome], ReadReport]:
    """What becomes of each row, streamed, and the report that reading fills up. Raises UserError as reading does, once
    all rows before are given."""
    report = ReadReport.of(dataset)
    return _outcomes(dataset, config, encoder, report), report


def lenient(config: DataConfig) -> DataConfig:
    """The settings under which rows that stop a run are told like any other."""
    return replace(config, on_bad_row="skip", truncation="drop" if config.truncation == "error" else config.truncation)


def _stopped_by(key: str, config: DataConfig) -> str | None:
    return f"data.{key}=error" if getattr(config, key) == "error" else None


def _outcomes(dataset: DatasetConfig, config: DataConfig, encoder: PairTokenizer,
              report: ReadReport) -> Iterator[Outcome]:
    for record in read_chunks(dataset, "skip", Share(records=1), config.ties):
        report.join(record.report)
        for reason, examples in record.report.bad.examples.items():
            for example in examples:
                where, _, detail = example.partition(f": {reason}")
                detail = detail.removeprefix(" (").removesuffix(")")
                yield NotTrained(where, reason, detail, True, _stopped_by("on_bad_row", config))
        for row in record.rows:
            yield _of(encoder.encode([row])[0], config)
    report.check(dataset, "skip")


def _of(whole: TokenizedPair | Dropped, config: DataConfig) -> Outcome:
    if isinstance(whole, Dropped):       # for what on_bad_row decides about
        return NotTrained(whole.where, whole.reason, whole.detail, False, _stopped_by("on_bad_row", config))
    pair = truncate(whole, lenient(config))
    if isinstance(pair, Dropped):
        too_long = n_tokens(whole) > config.max_length
        return NotTrained(pair.where, pair.reason, pair.detail, False,
                          _stopped_by("truncation", config) if too_long else None)
    prompt = hash64(np.array(whole.prompt_ids, dtype="<i4").tobytes())           # as prepare.py decides it
    return Trained(pair, whole, held_out=prompt < config.eval_fraction * 2**64)


def n_tokens(pair: TokenizedPair) -> int:
    """Tokens of the prompt and the longer completion: what data.max_length bounds."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


# ----------------------------------------------------------------------------------------------------- a look at a file


@dataclass
class Look:
    """What was seen of a data set: its first rows, and of those looked at the longest pair and one at random."""

    report: ReadReport
    first: list[Outcome] = field(default_factory=list)
    longest: tuple[int, Trained] | None = None           # (its number, from 1)
    random: tuple[int, Trained] | None = None            # not one of the first
    seen: int = 0                                        # outcomes
    pairs: int = 0
    dropped: Tally = field(default_factory=Tally)
    stopped_by: set[str] = field(default_factory=set)    # the settings that make a run stop at some of the rows
    whole: bool = False                                  # every row was looked at
    failure: UserError | None = None                     # what ended reading


def look_at(dataset: DatasetConfig, config: DataConfig, encoder: PairTokenizer, rows: int, seed: int,
            seconds: float) -> Look:
    """The first `rows` rows of a data set, and what can be seen of the next 2,000 within so many seconds."""
    stream, report = outcomes(dataset, config, encoder)
    look, lots, lowest = Look(report), random.Random(seed), 1.0
    began = time.monotonic()
    try:
        for outcome in stream:
            look.seen += 1
            if look.seen <= rows:
                look.first.append(outcome)
            if isinstance(outcome, Trained):
                look.pairs += 1
                if look.longest is None or n_tokens(outcome.pair) > n_tokens(look.longest[1].pair):
                    look.longest = look.seen, outcome
                # every pair draws a lot, and the lowest wins: so it depends little on how many are looked at
                if (lot := lots.random()) < lowest and look.seen > rows:
                    lowest, look.random = lot, (look.seen, outcome)
            else:
                if outcome.stopped_by:
                    look.stopped_by.add(outcome.stopped_by)
                if not outcome.bad:
                    look.dropped.add(outcome.reason, f"{outcome.where}: {outcome.detail or outcome.reason}")
            if look.seen >= max(rows, ROWS_LOOKED_AT) or (look.seen >= rows and time.monotonic() - began > seconds):
                return look
    except UserError as failure:
        look.failure = failure
    look.whole = look.failure is None
    return look
