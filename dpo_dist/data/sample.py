"""data.train[].rows: at most so many of a data set's records, chosen by their content.

The N records with the smallest hashes of their content: the same whatever the order of the rows or the kind of file,
and more rows keep those that fewer gave. Of records with the same content the first ones are taken.
"""
from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dpo_dist.data.records import Record, canonical

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
    return int.from_bytes(hashlib.blake2b(canonical(record.value), digest_size=8).digest(), "big")


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
