"""A row → its facts."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.facts import (
    ALIKE,
    ASKS,
    EMPTY_REASONING,
    EQUAL,
    LANGUAGES,
    RATED,
    SPECIAL,
    SPLIT_VOTE,
    TIES,
    TOKENS,
    FactsWriter,
)
from dpo_dist.audit.languages import asks_for, language_of
from dpo_dist.audit.style import FEATURES, features_of
from dpo_dist.audit.texts import (
    answer_hash,
    has_empty_reasoning,
    loose_hash,
    opening_of,
    prompt_hash,
    said,
    word_ids,
    words_of,
)
from dpo_dist.data.formats import DataRow
from dpo_dist.data.writer import hash64
from dpo_dist.types import PreferenceRow, TokenizedPair

# formats in whose rows the answers stand as they were shown, or as they were rated
SHOWN = ("argilla", "helpsteer")
LISTED = ("ratings", "distilabel", "ultrafeedback", "nemo_rl")
MOST_STRINGS = 200                           # of a record, among which the answers are sought
OPENINGS_KEPT = 20_000                       # whose words are known; frequent ones are among the first
NO_STYLE = [0] * len(FEATURES)
LANGUAGE = {name: at for at, name in enumerate(LANGUAGES)}


@dataclass
class Looker:
    """Goes through rows, and writes down what an audit needs to know of them."""

    marks: re.Pattern[str]
    writer: FactsWriter = field(default_factory=FactsWriter)
    # {hash of a prompt: its language}, of the last ones
    _asked_in: dict[int, str] = field(default_factory=dict)

    def look(self, row: DataRow, fields: Mapping[str, Any], form: str, data_set: int, split: int) -> tuple[int, int]:
        """Writes the row down. fields: the record that it was made of. (hash of the prompt, of the whole pair)."""
        pair = self._ids(row) if isinstance(row, TokenizedPair) else self._text(row, split)
        record = row.record
        if row.strength == 0 or _equal_ratings(record):
            pair["flags"] |= EQUAL
        if _split_vote(record.get("annotators")):
            pair["flags"] |= SPLIT_VOTE
        if isinstance(row, PreferenceRow) and form in (*SHOWN, *LISTED):
            pair["order"] = order_of(row, fields)
            pair["flags"] |= RATED if form in LISTED else 0
        tie = getattr(row, "tie", None) or ""
        annotator = record.get("annotator")
        self.writer.add(row.where, {**pair, "data_set": data_set, "tie": TIES.index(tie) if tie in TIES else 1,
                                    "annotator": hash64(str(annotator).encode()) >> 32 if annotator else 0})
        prompt, chosen, rejected = pair["content"]
        if isinstance(row, TokenizedPair) and self.writer.is_new(prompt, split):
            self._prompt(prompt, split, row.where, np.array(row.prompt_ids, dtype="<u4"), prompt)
        return prompt, hash64(b"%d %d %d" % (prompt, chosen, rejected))

    def look_at_prompt(self, text: str, where: str, split: int) -> None:
        """Writes down a prompt alone."""
        prompt = hash64(" ".join(text.split()).encode(errors="replace"))
        if self.writer.is_new(prompt, split):
            self._prompt_of_words(prompt, split, where, words_of(text))

    def _ids(self, row: TokenizedPair) -> dict[str, Any]:
        content = [hash64(np.array(ids, dtype="<i4").tobytes()) for ids in (row.prompt_ids, row.chosen_ids,
                                                                            row.rejected_ids)]
        return {"content": content, "length": [len(row.chosen_ids), len(row.rejected_ids)], "style": NO_STYLE,
                "opening": [0, 0], "language": [0, 0, 0], "order": 0, "flags": TOKENS}

    def _text(self, row: PreferenceRow, split: int) -> dict[str, Any]:
        prompt, chosen, rejected = said(row.prompt), said(row.chosen), said(row.rejected)
        content = [prompt_hash(row), answer_hash(row.chosen), answer_hash(row.rejected)]
        if self.writer.is_new(content[0], split):
            self._prompt_of_words(content[0], split, row.where, words_of(prompt))
        flags = 0
        if any(("<" in text or "[" in text) and self.marks.search(text) for text in (prompt, chosen, rejected)):
            flags |= SPECIAL
        if has_empty_reasoning(row.chosen) or has_empty_reasoning(row.rejected):
            flags |= EMPTY_REASONING
        if content[1] != content[2] and _alike(chosen, rejected):
            flags |= ALIKE
        asked, one, other = self._language_of_prompt(content[0], row), language_of(chosen), language_of(rejected)
        if asks_for(prompt[-2000:], *({one, other} - {asked})):
            flags |= ASKS
        style = [a - b for a, b in zip(features_of(chosen), features_of(rejected), strict=True)]
        return {"content": content, "length": [len(chosen), len(rejected)], "style": style, "flags": flags, "order": 0,
                "opening": [self._opening(chosen), self._opening(rejected)],
                "language": [LANGUAGE[name] for name in (asked, one, other)]}

    def _prompt_of_words(self, prompt: int, split: int, where: str, words: list[str]) -> None:
        numbers = hash64(" ".join(sorted(word for word in words if word.isdigit())).encode()) >> 32
        self._prompt(prompt, split, where, np.array(word_ids(words), dtype="<u4"), loose_hash(words), numbers)

    def _prompt(self, prompt: int, split: int, where: str, words: NDArray[np.uint32], loose: int,
                numbers: int = 0) -> None:
        self.writer.add_prompt(where, {"prompt": prompt, "loose": loose, "split": split, "numbers": numbers}, words)

    def _language_of_prompt(self, prompt: int, row: PreferenceRow) -> str:
        """Of the last turn of a user; the pairs of a prompt share it."""
        if prompt not in self._asked_in:
            if len(self._asked_in) > 1000:
                self._asked_in.clear()
            turns = row.prompt if not isinstance(row.prompt, str) else ({"role": "user", "content": row.prompt},)
            asked = next((str(turn.get("content") or "") for turn in reversed(turns) if turn.get("role") == "user"), "")
            self._asked_in[prompt] = language_of(asked)
        return self._asked_in[prompt]

    def _opening(self, text: str) -> int:
        words = opening_of(text)
        if not words:
            return 0
        key = hash64(words.encode(errors="replace")) >> 32
        if len(self.writer.openings) < OPENINGS_KEPT:
            self.writer.openings.setdefault(key, words)
        return key


def _alike(chosen: str, rejected: str) -> bool:
    """Whether two texts differ in case and white space at most."""
    return abs(len(chosen) - len(rejected)) < 200 and (
        "".join(chosen.split()).casefold() == "".join(rejected.split()).casefold())


def _equal_ratings(record: Mapping[str, Any]) -> bool:
    return any(record.get(f"chosen_{noun}") is not None and record.get(f"chosen_{noun}") == record.get(
        f"rejected_{noun}") for noun in ("rating", "rank"))


def _split_vote(annotators: Any) -> bool:
    """Whether of the annotators' votes a third or more went against the label, or none won."""
    if not isinstance(annotators, list):
        return False
    votes = [said_.get("preference") for said_ in annotators if isinstance(said_, dict)
             and said_.get("status") in (None, "submitted")]
    against, of = votes.count("rejected"), sum(vote in ("chosen", "rejected", "tie") for vote in votes)
    return of >= 2 and against > 0 and 3 * against >= of


def order_of(row: PreferenceRow, fields: Mapping[str, Any]) -> int:
    """1 where chosen stands before rejected in the record, -1 where after, 0 where that cannot be told."""
    chosen, rejected = (_last(part) for part in (row.chosen, row.rejected))
    first: dict[str, int] = {}
    for at, text in enumerate(_strings(fields)):
        first.setdefault(text.strip(), at)
        if at >= MOST_STRINGS:
            break
    a, b = first.get(chosen), first.get(rejected)
    return 0 if a is None or b is None or a == b else 1 if a < b else -1


def _last(part: Any) -> str:
    return (part if isinstance(part, str) else str(part[-1].get("content") or "")).strip()


def _strings(value: Any) -> Iterator[str]:
    """All texts in a record, fields by their names (response1 before response2), lists as they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _strings(value[key])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
