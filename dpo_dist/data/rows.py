"""Records → PreferenceRows: one function a data format, and the table FORMATS.

Every format may also carry `weight` (> 0, the pair's weight in the loss), `strength` or `margin` (how much better
chosen is, in the data's own unit) and `tags` ({name: value}). A row that does not fit is a bad row, with file, line
and reason: an error, or left out and counted (data.on_bad_row).
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.fields import (
    Fields,
    Turns,
    Unfit,
    ids_of,
    judgment_of,
    n_shared,
    need,
    number,
    sharegpt_turn,
    sound_text,
    text_of,
    tools_of,
    turns_of,
    with_system,
)
from dpo_dist.data.files import BadRow, Record, read_records
from dpo_dist.types import Message, PreferenceRow, TokenizedPair

DataRow = PreferenceRow | TokenizedPair
EXAMPLES_PER_REASON = 3


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


@dataclass
class ReadReport:
    """What became of a data set's rows. Complete once the rows have all been consumed."""

    source: str
    format: str
    rows: int = 0                            # records read
    pairs: int = 0                           # judgments that they gave (one row of ratings may give many)
    ties: int = 0                            # pairs of equally rated responses: no judgment
    bad: Tally = field(default_factory=Tally)


def read_rows(dataset: DatasetConfig, on_bad_row: Literal["error", "skip"]) -> tuple[Iterator[DataRow], ReadReport]:
    """The rows of a data set, streamed, and a report that fills up as they are consumed.

    Raises UserError (from the iterator) for files that cannot be read, for a format that cannot be told, and, once all
    rows have been looked at, for bad rows unless `on_bad_row` is skip.
    """
    report = ReadReport(source=dataset.name or dataset.path, format=dataset.format)
    return _read(dataset, on_bad_row, report), report


def _read(dataset: DatasetConfig, on_bad_row: str, report: ReadReport) -> Iterator[DataRow]:
    for record in read_records(dataset):
        report.rows += 1
        for outcome in _outcomes(record, report):
            if outcome is None:
                report.ties += 1
            elif isinstance(outcome, BadRow):
                report.bad.add(outcome.reason, str(outcome))
            elif on_bad_row == "skip" or not report.bad.counts:      # after a first bad row the rest is only counted
                report.pairs += 1
                yield outcome
    if not report.rows:
        raise UserError(f"data path '{dataset.path}' has no rows; give a file with rows, or remove it")
    if on_bad_row == "error" and report.bad.counts:
        shown = "".join(f"\n  {text}" for texts in report.bad.examples.values() for text in texts)
        raise UserError(f"{sum(report.bad.counts.values())} bad row(s) of {report.rows} in '{dataset.path}' (format "
                        f"{report.format}):{shown}\n"
                        "mend them, or set data.on_bad_row=skip to leave them out and count them")


def _outcomes(record: Record | BadRow, report: ReadReport) -> Iterator[DataRow | BadRow | None]:
    """What a record gives: rows, None for a tie, or what is wrong with it."""
    if isinstance(record, BadRow):
        yield record
        return
    try:
        if not isinstance(record.value, dict):
            raise Unfit("the row is not an object with fields", type(record.value).__name__)
        fields = {key: value for key, value in record.value.items() if value is not None}
        if report.format == "auto":
            report.format = detect_format(fields, record.where)
        for row in FORMATS[report.format].read(fields, record.where, report.source):
            try:
                yield row if row is None else _checked(row)
            except Unfit as unfit:           # one pair of a ratings row may be bad, the others good
                yield BadRow(record.where, unfit.reason, unfit.detail)
    except Unfit as unfit:
        yield BadRow(record.where, unfit.reason, unfit.detail)


def detect_format(fields: Fields, where: str) -> str:
    """The one format that a row's fields fit. Raises UserError where none or several do."""
    fitting = [name for name, entry in FORMATS.items() if entry.fits(fields)]
    if len(fitting) == 1:
        return fitting[0]
    known = "".join(f"\n  {name}: {entry.needs}" for name, entry in FORMATS.items())
    found = f"several formats ({', '.join(fitting)}) fit" if fitting else "no format fits"
    raise UserError(f"{where}: {found} the fields {', '.join(fields) or '(none)'}; set `format` in its data entry, as "
                    f"in data.train=[{{path: ..., format: {(fitting or ['preference'])[0]}}}]. The formats and what "
                    f"they need:{known}")


# --------------------------------------------------------------------------------------------------------------- checks


def _checked(row: DataRow) -> DataRow:
    if isinstance(row, TokenizedPair):
        parts: tuple[Any, ...] = (row.prompt_ids, row.chosen_ids, row.rejected_ids)
    else:
        parts = (row.prompt, row.chosen, row.rejected)
    for name, part in zip(("prompt", "chosen", "rejected"), parts, strict=True):
        ends_empty = isinstance(part, tuple) and name != "prompt" and _is_empty(part[-1:])
        if _is_empty(part) or ends_empty:
            raise Unfit(f"{name} is empty")
    if parts[1] == parts[2]:
        raise Unfit("chosen and rejected are identical")
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


def _diverge(chosen: Turns, rejected: Turns, where: str, source: str, system: Fields, **rest: Any) -> PreferenceRow:
    """The row of two whole conversations: the prompt is what they share. They must part at an assistant turn."""
    if chosen == rejected:
        raise Unfit("chosen and rejected are identical")
    n = n_shared(chosen, rejected)
    for turns in (chosen, rejected):
        if turns[n:] and turns[n]["role"] != "assistant":
            raise Unfit(f"chosen and rejected part at a {turns[n]['role']} turn, not at an answer", f"turn {n + 1}")
    return PreferenceRow(with_system(system, chosen[:n]), chosen[n:], rejected[n:], where, source, **rest)


# -------------------------------------------------------------------------------------------------------------- formats


def preference(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"prompt", "chosen", "rejected"}: texts; with a `system` text they become messages."""
    prompt, chosen, rejected = (text_of(fields, key) for key in ("prompt", "chosen", "rejected"))
    if not sound_text(fields.get("system", ""), "system").strip():
        yield PreferenceRow(prompt, chosen, rejected, where, source, **judgment_of(fields))
        return
    turns = with_system(fields, turns_of(prompt, "prompt", "user"))
    yield PreferenceRow(turns, turns_of(chosen, "chosen", "assistant"), turns_of(rejected, "rejected", "assistant"),
                        where, source, **judgment_of(fields))


def messages(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """Chat lists of {"role", "content"}. Without `prompt`, or where both repeat it, the prompt is what they share."""
    need(fields, "chosen", "rejected")
    chosen, rejected = (turns_of(fields[key], key, "assistant") for key in ("chosen", "rejected"))
    rest = {"tools": tools_of(fields), **judgment_of(fields)}
    prompt = turns_of(fields["prompt"], "prompt", "user") if "prompt" in fields else ()
    if prompt and all(turns and turns[0]["role"] == "assistant" for turns in (chosen, rejected)):
        yield PreferenceRow(with_system(fields, prompt), chosen, rejected, where, source, **rest)
        return
    row = _diverge(chosen, rejected, where, source, fields, **rest)
    if prompt and row.prompt[-len(prompt):] != prompt:
        raise Unfit("chosen and rejected begin with turns other than prompt")
    yield row


def sharegpt(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"conversations": [{"from", "value"}], "chosen", "rejected"}: the last two are one turn, or a list of turns."""
    need(fields, "conversations", "chosen", "rejected")
    prompt = turns_of(fields["conversations"], "conversations", "user", sharegpt_turn)
    chosen, rejected = (turns_of(fields[key], key, "assistant", sharegpt_turn) for key in ("chosen", "rejected"))
    yield PreferenceRow(with_system(fields, prompt), chosen, rejected, where, source, tools=tools_of(fields),
                        **judgment_of(fields))


def hh(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """Two transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." that share all but the last answer.

    Where they part earlier, at an answer, the prompt is the shared turns and the completions hold several turns; at a
    human turn the row is bad. Turns of one speaker in a row (8 of hh-rlhf's 2,312) are one turn, since no chat template
    takes them otherwise.
    """
    chosen, rejected = (_transcript(text_of(fields, key), key) for key in ("chosen", "rejected"))
    yield _diverge(chosen, rejected, where, source, fields, **judgment_of(fields))


def _transcript(text: str, key: str) -> Turns:
    head, *pieces = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    if head.strip():
        raise Unfit(f"{key} does not begin with 'Human:'", repr(head[:40]))
    turns: list[Message] = []
    for speaker, text_of_turn in zip(pieces[::2], pieces[1::2], strict=True):
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text_of_turn.strip()
        else:
            turns.append({"role": role, "content": text_of_turn.strip()})
    return tuple(turns)


def ratings(fields: Fields, where: str, source: str) -> Iterator[DataRow | None]:
    """A prompt and rated responses: a row for each pair with different ratings, strength = their difference; None for a
    tie.

    `responses` (texts or messages) with `ratings` or `scores` beside it, or a list of {"response" | "content" | "text",
    "rating" | "score"}; UltraFeedback's `instruction` and `completions` with `overall_score` as well.
    """
    key = "instruction" if "instruction" in fields and "prompt" not in fields else "prompt"
    need(fields, key)
    rated = _rated(fields)
    judgment = {**judgment_of(fields), "tools": tools_of(fields)}
    as_text = (isinstance(fields[key], str) and all(isinstance(answer, str) for answer, _ in rated)
               and "system" not in fields)
    prompt = sound_text(fields[key], key) if as_text else with_system(fields, turns_of(fields[key], key, "user"))
    answers = [(sound_text(a, "response") if as_text else turns_of(a, "response", "assistant"), rating)
               for a, rating in rated]
    for (a, rating_a), (b, rating_b) in combinations(answers, 2):
        if rating_a == rating_b:
            yield None
        else:
            chosen, rejected = (a, b) if rating_a > rating_b else (b, a)
            yield PreferenceRow(prompt, chosen, rejected, where, source,
                                **{**judgment, "strength": abs(rating_a - rating_b)})


def _rated(fields: Fields) -> list[tuple[Any, float]]:
    responses = fields.get("responses", fields.get("completions"))
    if not isinstance(responses, list) or len(responses) < 2:
        raise Unfit("responses is not a list of two or more")
    beside = next((fields[k] for k in ("ratings", "scores") if k in fields), None)
    if beside is not None:
        if not isinstance(beside, list) or len(beside) != len(responses):
            raise Unfit("ratings and responses differ in number")
        return [(answer, number(rating, "rating")) for answer, rating in zip(responses, beside, strict=True)]
    out = []
    for response in responses:
        known = response if isinstance(response, dict) else {}
        answer = next((known[k] for k in ("response", "content", "text") if k in known), None)
        if answer is None:
            raise Unfit("a response has no text, or there are no ratings beside the responses", repr(response)[:60])
        rating = next((known[k] for k in ("rating", "score", "overall_score") if k in known), None)
        out.append((answer, number(rating, "rating")))
    return out


def token_ids(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"}: lists of token ids, taken as they are."""
    judgment = judgment_of(fields)
    prompt, chosen, rejected = (ids_of(fields, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    yield TokenizedPair(prompt, chosen, rejected, where, source, judgment["strength"], judgment["weight"])


@dataclass(frozen=True)
class Format:
    read: Callable[[Fields, str, str], Iterator[DataRow | None]]
    needs: str                               # for a person
    fits: Callable[[Fields], bool]           # could a row with these fields be of this format?


FORMATS: dict[str, Format] = {
    "preference": Format(preference, "prompt, chosen, rejected (texts)",
                         lambda f: all(isinstance(f.get(k), str) for k in ("prompt", "chosen", "rejected"))),
    "messages": Format(messages, "chosen, rejected (lists of {role, content}), and prompt unless they begin with it",
                       lambda f: "conversations" not in f and "rejected" in f
                       and isinstance(f.get("chosen"), list | dict)),
    "sharegpt": Format(sharegpt, "conversations, chosen, rejected ({from, value})",
                       lambda f: all(k in f for k in ("conversations", "chosen", "rejected"))),
    "hh": Format(hh, "chosen, rejected (transcripts 'Human: ... Assistant: ...')",
                 lambda f: "prompt" not in f and all(isinstance(f.get(k), str) and f[k].lstrip().startswith("Human:")
                                                     for k in ("chosen", "rejected"))),
    "ratings": Format(ratings, "prompt, responses, ratings (or responses of {text, rating}; or instruction, "
                               "completions)",
                      lambda f: isinstance(f.get("responses", f.get("completions")), list)),
    "token_ids": Format(token_ids, "prompt_ids, chosen_ids, rejected_ids (lists of whole numbers)",
                        lambda f: all(k in f for k in ("prompt_ids", "chosen_ids", "rejected_ids"))),
}
