"""The data formats: one function each, which reads a record's fields, and the table FORMATS.

Every format may also carry `weight` (> 0, the pair's weight in the loss), `strength` or `margin` (how much better
chosen is, in the data's own unit) and `tags` ({name: value}). What does not fit raises Unfit.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.data.fields import (
    Fields,
    Turns,
    Unfit,
    counts_of,
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
from dpo_dist.types import Message, PreferenceRow, TokenizedPair

DataRow = PreferenceRow | TokenizedPair


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


def _diverge(chosen: Turns, rejected: Turns, where: str, source: str, system: Fields, **rest: Any) -> PreferenceRow:
    """The row of two whole conversations: the prompt is what they share. They must part at an assistant turn."""
    if chosen == rejected:
        raise Unfit("chosen and rejected are identical")
    n = n_shared(chosen, rejected)
    for turns in (chosen, rejected):
        if turns[n:] and turns[n]["role"] != "assistant":
            raise Unfit(f"chosen and rejected part at a {turns[n]['role']} turn, not at an answer", f"turn {n + 1}")
    return PreferenceRow(with_system(system, chosen[:n]), chosen[n:], rejected[n:], where, source, **rest)


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
    """{"prompt_ids", "chosen_ids", "rejected_ids"}: lists of token ids, taken as they are. `chosen_counts` and
    `rejected_counts`, lists of 0 and 1 as long as their ids: which of a completion's tokens the loss counts."""
    judgment = judgment_of(fields)
    prompt, chosen, rejected = (ids_of(fields, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    yield TokenizedPair(prompt, chosen, rejected, where, source, **judgment,
                        chosen_counts=counts_of(fields, "chosen_counts", chosen),
                        rejected_counts=counts_of(fields, "rejected_counts", rejected))


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
