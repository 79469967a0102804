"""A file's own columns → the names that formats know: data.train[].columns, and chats and lists that stand as text."""
from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.data.fields import Fields, Unfit
from dpo_dist.data.formats.judgment import RECORDED
from dpo_dist.data.messages import chat_in_text, value_in_text
from dpo_dist.data.records import BadRow, Record

ABSENT = object()
# Where these hold text, as in a CSV, it is that of a list.
LISTS = ("tools", "responses", "completions", "ratings", "scores", "generations", "generation_models", "history",
         "individual_preference", "prompt_ids", "chosen_ids", "rejected_ids", "models", "versions", "annotators")
FLATTENED = (".responses", ".responses.users", ".responses.status")              # Argilla's, after any question's name
NUMBERS = ("weight", "strength", "margin", "confidence")
# Text of these that looks like a chat must be one; text of other columns may be anything.
CHATS = ("prompt", "chosen", "rejected", "messages", "conversations", "context", "completion", "chosen_response",
         "rejected_response", "rejected_messages", "preferred_output", "non_preferred_output", "conversation_a",
         "conversation_b")
# names that formats read, for mistakes in spelling; Argilla's depend on a data set's own questions
KNOWN = {*LISTS, *CHATS, *NUMBERS, *RECORDED, "tie", "both_bad", "system", "system_prompt", "chat_template_kwargs",
         "instruction", "question", "query", "input", "output", "response", "label", "overall_preference",
         "preference_strength", "winner", "response_a", "response_b", "model_a", "model_b"}


class Columns:
    """data.train[].columns: {a name that formats know: the column that holds it, None for no column}. Raises UserError
    for a name that looks misspelt."""

    def __init__(self, names: Mapping[str, str | None] | None):
        self.names = names or {}
        for name, column in self.names.items():
            meant = get_close_matches(name, KNOWN, 1, cutoff=0.8)
            if column is not None and name not in KNOWN and meant and not re.search(r"[\d.]", name):
                raise UserError(f"columns={{{name}: {column}}} names nothing that formats read; did you mean "
                                f"{meant[0]}?")
        # the columns that no row had so far
        self.unseen = {column for column in self.names.values() if column is not None}

    def fields_of(self, value: Any) -> Fields:
        """The row's fields under the names that formats know, without nulls, chats read. Raises Unfit."""
        if not isinstance(value, dict):
            raise Unfit("the row is not an object with fields", type(value).__name__)
        named = self._renamed(value) if self.names else value
        fields = {key: inner for key, inner in named.items() if inner is not None and not _is_gap(key, inner)}
        for key, inner in fields.items():
            if isinstance(inner, str) and inner.lstrip()[:1] in ("[", "{"):
                fields[key] = _read_text(key, inner)
        return fields

    def _renamed(self, row: Fields) -> Fields:
        """The row with each named column under its new name alone; what stood under that name before is gone."""
        found = {name: ABSENT if column is None else _look_up(row, column) for name, column in self.names.items()}
        if self.unseen:
            self.unseen -= {column for name, column in self.names.items() if found[name] is not ABSENT and column}
        rest = {key: value for key, value in row.items() if key not in self.names and key not in self.names.values()}
        return rest | {name: value for name, value in found.items() if value is not ABSENT}


def _is_gap(key: str, value: Any) -> bool:
    """Whether it is the NaN that pandas has for null. Where a number is meant, a NaN may be a mistake."""
    return isinstance(value, float) and math.isnan(value) and key not in NUMBERS


def _look_up(row: Fields, column: str) -> Any:
    """The column's value; with dots, as in input.messages, that of an object within the row."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, dict) or key not in value:
            return ABSENT
        value = value[key]
    return value


def _read_text(key: str, text: str) -> Any:
    openai = key == "input" and '"messages"' in text                 # in other formats it is text of any kind
    if key in LISTS or key.endswith(FLATTENED) or openai:
        value = value_in_text(text)
        return value if isinstance(value, list) or (isinstance(value, dict) and "messages" in value) else text
    try:
        return chat_in_text(text, key)
    except Unfit:
        if key in CHATS:
            raise
        return text


def named(records: Iterator[Record | BadRow | None], columns: Columns) -> Iterator[Record | BadRow | None]:
    """The records with their fields under the names that formats know; a bad row for each that has no fields. None, for
    one that is not wanted, stays None."""
    for record in records:
        if isinstance(record, Record):
            try:
                yield Record(record.where, columns.fields_of(record.value))
            except Unfit as unfit:
                yield BadRow(record.where, unfit.reason, unfit.detail)
        else:
            yield record


def check_seen(unseen: Collection[str], path: str) -> None:
    """UserError for columns of data.train[].columns that no row has."""
    if unseen:
        raise UserError(f"columns names {', '.join(map(repr, sorted(unseen)))}, which no row of '{path}' has; mend "
                        "`columns` in its data entry")
