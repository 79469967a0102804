"""A record → what it gives: checked rows with all that is known of them, ties, or what is wrong with it."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from dpo_dist.data.fields import IDENTICAL, Unfit
from dpo_dist.data.formats import DataRow, Format, NoPair, Tie
from dpo_dist.data.formats.free import free_columns, joined
from dpo_dist.data.formats.ties import tie_of
from dpo_dist.data.records import BadRow, Record, json_ready
from dpo_dist.types import PreferenceRow, TieKind, TokenizedPair

Ties = Literal["drop", "keep"]               # data.ties
TieDropped = TieKind                         # a tie that is counted and left out


def outcomes(record: Record, form: Format, source: str, ties: Ties) -> Iterator[DataRow | BadRow | NoPair | TieDropped]:
    """What a record gives: rows (with `tie` where they are ties that are kept), ties that are not, NoPair, or what is
    wrong with it."""
    said = None
    try:
        said = tie_of(record.value) if form.may_say_tie else None
        if said is not None and ties == "drop":
            yield said                       # and nothing else of the row is looked at
            return
        columns = {"columns": free_columns(record.value, form.reads)}
        for outcome in form.read(record.value, record.where, source):
            try:
                if isinstance(outcome, NoPair):
                    yield outcome
                elif isinstance(outcome, Tie):
                    yield outcome.kind if ties == "drop" else _kept(outcome.row(), outcome.kind, columns)
                else:
                    yield _kept(outcome, said, columns)
            except Unfit as unfit:           # one pair of a ratings row may be bad, the others good
                yield _unfit(unfit, record, outcome.kind if isinstance(outcome, Tie) else said)
    except Unfit as unfit:
        yield _unfit(unfit, record, said)


def _kept(row: DataRow, tie: TieKind | None, columns: dict[str, Any]) -> DataRow:
    """The row, checked, with its record's free columns; of a tie with a strength of 0. Raises Unfit."""
    if columns["columns"]:
        row = replace(row, record=joined(columns, row.record))
    if row.record:                           # names and texts of it may be such that no file takes them
        row = replace(row, record=json_ready(row.record))
    return checked(row if tie is None else replace(row, tie=tie, strength=0.0))


def _unfit(unfit: Unfit, record: Record, tie: TieKind | None) -> BadRow | NoPair:
    if tie and unfit.reason == IDENTICAL:    # nothing is wrong with it, but there is nothing to learn either
        return NoPair("a tie of identical answers")
    return BadRow(record.where, unfit.reason, unfit.detail)


def checked(row: DataRow) -> DataRow:
    """The row, if prompt and completions are there, differ, and are said by whom they must be. Raises Unfit."""
    if isinstance(row, TokenizedPair):
        parts: tuple[Any, ...] = (row.prompt_ids, row.chosen_ids, row.rejected_ids)
    else:
        parts = (row.prompt, row.chosen, row.rejected)
    for name, part in zip(("prompt", "chosen", "rejected"), parts, strict=True):
        ends_empty = isinstance(part, tuple) and name != "prompt" and _is_empty(part[-1:])
        if _is_empty(part) or ends_empty:
            raise Unfit(f"{name} is empty")
    if parts[1] == parts[2]:
        raise Unfit(IDENTICAL)
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
