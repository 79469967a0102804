"""data.train[].rows and pairs_per_prompt: at most so many of a data set's records, or of a prompt's pairs, chosen by
their content.

Those with the smallest hashes of their content: the same whatever the order of the rows or the kind of file, and a
larger number keeps what a smaller one gave. Of those with the same content the first ones are taken.
"""
from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dpo_dist.data.formats import DataRow
from dpo_dist.data.records import Record, canonical
from dpo_dist.types import TokenizedPair

Place = tuple[int, int]                      # the number of a record, and of a pair among those that it gives
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Threshold:
    """Which records are in: those with a smaller hash, and of those with this hash the ones named."""

    hash: int
    where: frozenset[str]

    def takes(self, record: Record) -> bool:
        found = content_hash(record)
        return found < self.hash or (found == self.hash and record.where in self.where)


def content_hash(record: Record) -> int:
    return _hash(canonical(record.value))


def threshold(entries: Iterable[object], rows: int) -> Threshold | None:
    """What parts the `rows` records to take from the others; None where there are no more than that. Bad rows among the
    entries do not count."""
    largest_first: list[tuple[int, int, str]] = []       # a heap of those that are in so far
    more = False
    for position, record in enumerate(entries):
        if not isinstance(record, Record):
            continue
        entry = (-content_hash(record), -position, record.where)
        if len(largest_first) < rows:
            heapq.heappush(largest_first, entry)
        else:
            heapq.heappushpop(largest_first, entry)
            more = True
    if not more:
        return None
    last = largest_first[0][0]
    return Threshold(-last, frozenset(where for negative, _, where in largest_first if negative == last))


def sampled(entries: Iterable[Entry], limit: Threshold | None) -> Iterator[Entry]:
    """The entries that are in, in their order. Bad rows always are, so that they are counted."""
    return (entry for entry in entries if limit is None or not isinstance(entry, Record) or limit.takes(entry))


@dataclass(frozen=True)
class PromptCap:
    """Which pairs are in, of prompts that have more than they may: those up to the prompt's bound."""

    bounds: dict[int, tuple[int, Place]]     # by the prompt's hash: of the last pair that is in

    def takes(self, row: DataRow, place: Place) -> bool:
        prompt, pair = row_hashes(row)
        return prompt not in self.bounds or (pair, place) <= self.bounds[prompt]


def row_hashes(row: DataRow) -> tuple[int, int]:
    """(of the prompt, of the whole pair), of their content alone."""
    parts = ((row.prompt_ids, row.chosen_ids, row.rejected_ids) if isinstance(row, TokenizedPair) else
             (row.prompt, row.chosen, row.rejected))
    prompt, *answers = (canonical(list(part) if isinstance(part, tuple) else part) for part in parts)
    return _hash(prompt), _hash(b"\0".join((prompt, *answers)))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def prompt_cap(rows: Iterable[tuple[DataRow, Place]], pairs: int) -> PromptCap:
    """The cap that leaves at most so many pairs of each prompt. In memory stays what may be in."""
    largest_first: dict[int, list[tuple[int, Place]]] = {}           # of each prompt a heap of those that are in so far
    more = set()
    for row, (record, at) in rows:
        prompt, pair = row_hashes(row)
        kept, entry = largest_first.setdefault(prompt, []), (-pair, (-record, -at))
        if len(kept) < pairs:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
            more.add(prompt)
    last = {prompt: largest_first[prompt][0] for prompt in more}
    return PromptCap({prompt: (-pair, (-record, -at)) for prompt, (pair, (record, at)) in last.items()})
