"""What becomes of rows once they are tokens: what truncation takes, and what a template makes wrong."""
from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.formats import DataRow
from dpo_dist.data.templates import stop_tokens
from dpo_dist.data.tokenize import Dropped, PairTokenizer
from dpo_dist.data.writer import hash64
from dpo_dist.types import PreferenceRow, TokenizedPair

ROWS_LOOKED_AT = 10_000                      # tokenized here, of all data sets together ...
CHARS_LOOKED_AT = 40_000_000                 # ... and no more text than about a minute takes
AT_ONCE = 256                                # rows
# faults, in the order in which a pair is told by one
NO_TEMPLATE, NOT_A_PREFIX, RENDERED, REFUSED = ("the template cannot be used", "prompt is not a prefix",
                                                "rendered already", "the template refuses the row")
TWO_BEGINNINGS, TWO_ENDS, NO_END = "double BOS", "double end", "no end of turn"


@dataclass
class TokenFacts:
    """Of the rows that were tokenized, or came as tokens."""

    looked_at: int = 0
    left: int = 0                            # that were not, to bound the time
    too_long: list[str] = field(default_factory=list)                # where
    lost: int = 0                            # tokens beyond data.max_length, of all of them
    tokens: int = 0                          # prompt and the longer answer, of all
    faults: dict[str, list[str]] = field(default_factory=dict)       # {fault: where}
    held_out: set[int] = field(default_factory=set)                  # prompt hashes that data.eval_fraction holds out
    unusable: str = ""                       # why no text can be tokenized

    def join(self, later: TokenFacts) -> None:
        self.looked_at, self.left = self.looked_at + later.looked_at, self.left + later.left
        self.lost, self.tokens = self.lost + later.lost, self.tokens + later.tokens
        self.too_long += later.too_long
        self.held_out |= later.held_out
        self.unusable = self.unusable or later.unusable
        for fault, places in later.faults.items():
            self.faults.setdefault(fault, []).extend(places)

    def fault(self, name: str, where: str) -> None:
        self.faults.setdefault(name, []).append(where)


class Sample:
    """Rows to tokenize: all where there are few, else those with the smallest hashes of their content."""

    def __init__(self, rows: int, chars: int):
        self._rows, self._chars = rows, chars
        self._kept: list[tuple[int, int, DataRow, int]] = []         # a heap, the largest hash first
        self.seen = 0

    def offer(self, content: int, row: DataRow, prompt: int) -> None:
        self.seen += 1
        entry = (-content, -self.seen, row, prompt)
        if len(self._kept) < self._rows:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    def rows(self) -> list[tuple[DataRow, int]]:
        """(row, hash of its prompt) of those that were chosen, as they stood, within the bound on text."""
        out: list[tuple[int, DataRow, int]] = []
        left = self._chars
        for _, position, row, prompt in sorted(self._kept, key=lambda entry: -entry[0]):
            left -= _chars(row)
            if left < 0 and out:
                break
            out.append((-position, row, prompt))
        return [(row, prompt) for _, row, prompt in sorted(out, key=lambda entry: entry[0])]


def _chars(row: DataRow) -> int:
    if isinstance(row, TokenizedPair):
        return 0
    return sum(len(part) if isinstance(part, str) else sum(len(str(turn.get("content") or "")) for turn in part)
               for part in (row.prompt, row.chosen, row.rejected))


def look_at_tokens(rows: Sequence[tuple[DataRow, int]], tokenizer: Any | None, config: DataConfig,
                   tell: Callable[[int], None]) -> TokenFacts:
    """The facts of these rows; `tell` is told how many are done."""
    facts = TokenFacts()
    lenient = replace(config, on_bad_row="skip", truncation="drop" if config.truncation == "error" else
                      config.truncation)
    try:
        encoder = PairTokenizer.of(tokenizer, lenient)
    except UserError as error:
        facts.unusable = str(error)
        for row, _ in rows:
            if isinstance(row, PreferenceRow):
                facts.fault(NO_TEMPLATE, row.where)
        facts.looked_at = len(rows)
        return facts
    ends = _ends(tokenizer, encoder)
    closes = encoder.templates is None or bool(encoder.templates.default.end_of_turn or any(
        encoder.templates.default.stops))
    for at in range(0, len(rows), AT_ONCE):
        block = rows[at:at + AT_ONCE]
        tell(at)
        try:
            encoded = encoder.encode([row for row, _ in block])
        except UserError as error:               # no tokenizer, or messages without a template: the same of all rows
            facts.unusable = str(error)
            break
        for (row, prompt), pair in zip(block, encoded, strict=True):
            facts.looked_at += 1
            if isinstance(pair, Dropped):
                facts.fault(_named(pair), pair.where)
                continue
            _look(pair, facts, config, tokenizer, ends)
            if not closes and isinstance(row, PreferenceRow):
                facts.fault(NO_END, row.where)
            if hash64(np.array(pair.prompt_ids, dtype="<i4").tobytes()) < config.eval_fraction * 2**64:
                facts.held_out.add(prompt)
    return facts


def _named(dropped: Dropped) -> str:
    if "rendered already" in dropped.reason:
        return RENDERED
    return NOT_A_PREFIX if "otherwise once an answer follows" in dropped.detail else REFUSED


def _ends(tokenizer: Any | None, encoder: PairTokenizer) -> set[int]:
    """Ids that end a turn or a text."""
    if tokenizer is None:
        return set()
    names: set[str] = {*stop_tokens(tokenizer)}
    if encoder.templates is not None:
        names |= {*encoder.templates.default.end_of_turn, *encoder.templates.default.stops}
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names if name}
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _look(pair: TokenizedPair, facts: TokenFacts, config: DataConfig, tokenizer: Any | None,
          ends: Collection[int]) -> None:
    length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    facts.tokens += length
    if length > config.max_length:
        facts.too_long.append(pair.where)
        facts.lost += length - config.max_length
    if tokenizer is None:
        return
    answers = (pair.chosen_ids, pair.rejected_ids)
    bos = tokenizer.bos_token_id
    begins = bos is not None and bos not in ends and any(ids[0] == bos for ids in answers if ids)
    if begins or (bos is not None and pair.prompt_ids[:2] == (bos, bos)):
        facts.fault(TWO_BEGINNINGS, pair.where)
    elif any(len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in ends for ids in answers):
        facts.fault(TWO_ENDS, pair.where)
    elif ends and any(ids[-1] not in ends for ids in answers if ids):
        facts.fault(NO_END, pair.where)
