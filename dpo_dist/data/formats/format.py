"""What a data format is: how its rows are told from others, grouped where a pair takes several, and read."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dpo_dist.data.fields import Fields
from dpo_dist.data.records import BadRow, Record
from dpo_dist.types import PreferenceRow, TieKind, TokenizedPair

DataRow = PreferenceRow | TokenizedPair


@dataclass(frozen=True)
class NoPair:
    """A record that is sound, but holds no judgment between two answers; counted by its reason."""

    reason: str


@dataclass(frozen=True)
class Tie:
    """Two answers of which neither is better."""

    kind: TieKind
    row: Callable[[], DataRow]               # the two, in any order, for who keeps ties; raises Unfit


# What a record gives: pairs, ties, NoPair
Outcome = DataRow | NoPair | Tie


@dataclass(frozen=True)
class Format:
    read: Callable[[Fields, str, str], Iterator[Outcome]]            # (fields, where, source); raises Unfit
    needs: str                               # for a person
    fits: Callable[[Fields], bool]           # could a row with these fields be of this format?
    reads: str = ""                          # a regular expression of the names that it reads; others are free columns
    # a row names which answer is chosen, so that it must say where neither is better (ties.py); else the reader knows
    may_say_tie: bool = False
    # records of one answer each → records of a pair, streamed; before rows are read
    group: Callable[[Iterable[Record | BadRow]], Iterator[Record | BadRow | NoPair]] | None = None
