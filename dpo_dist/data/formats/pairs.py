"""Formats whose rows are a chosen and a rejected completion: texts, chats, transcripts, token ids."""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dpo_dist.data.fields import IDENTICAL, Fields, Turns, Unfit, counts_of, ids_of, n_shared, need, text_of
from dpo_dist.data.formats.format import DataRow
from dpo_dist.data.formats.judgment import judgment_of
from dpo_dist.data.messages import system_of, turns_of, with_system
from dpo_dist.types import Message, PreferenceRow, TokenizedPair


def preference(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"prompt", "chosen", "rejected"}: texts; with a `system` text they become messages. A row of chats among them is
    read as `messages` reads it."""
    if any(isinstance(fields.get(key), list | dict) for key in ("prompt", "chosen", "rejected")):
        yield from messages(fields, where, source)
        return
    prompt, chosen, rejected = (text_of(fields, key) for key in ("prompt", "chosen", "rejected"))
    yield pair(prompt, chosen, rejected, fields, where, source, **judgment_of(fields))


def pair(prompt: Any, chosen: Any, rejected: Any, fields: Fields, where: str, source: str, system: str = "system",
         **judgment: Any) -> PreferenceRow:
    """The row of a prompt and two completions, each text or chat: texts if all of them are and there is no system text,
    else messages. `system`: the field of the system text."""
    if (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
            and not system_of(fields, system).strip()):
        for key, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            text_of({key: text}, key)
        return PreferenceRow(prompt, chosen, rejected, where, source, **judgment)
    return PreferenceRow(with_system(fields, turns_of(prompt, "prompt", "user"), system),
                         turns_of(chosen, "chosen", "assistant"), turns_of(rejected, "rejected", "assistant"),
                         where, source, **judgment)


def messages(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """Chat lists of {"role", "content"}. Without `prompt`, or where both repeat it, the prompt is what they share.

    `prompt` may also be their first question alone, as distilabel writes it; `messages` beside answers is the prompt.
    """
    need(fields, "chosen", "rejected")
    chosen, rejected = (turns_of(fields[key], key, "assistant") for key in ("chosen", "rejected"))
    rest = judgment_of(fields)
    answers = all(turns and turns[0]["role"] == "assistant" for turns in (chosen, rejected))
    key = "messages" if "prompt" not in fields and "messages" in fields and answers else "prompt"
    if answers:                              # else all that a system text leaves for a prompt is that
        need(fields, key)
    prompt = turns_of(fields[key], key, "user") if key in fields else ()
    if prompt and answers:
        yield PreferenceRow(with_system(fields, prompt), chosen, rejected, where, source, **rest)
        return
    row = diverge(chosen, rejected, where, source, fields, **rest)
    if prompt and not _within(prompt, row.prompt):
        raise Unfit("chosen and rejected begin with turns other than prompt")
    yield row


def _within(prompt: Turns, shared: Turns | str) -> bool:
    """Whether the turns of `prompt` stand, one after another, among the shared ones, white space aside."""
    asked, known = ([(turn["role"], turn["content"].strip()) for turn in turns if isinstance(turn, dict)]
                    for turns in (prompt, shared))
    return any(known[at:at + len(asked)] == asked for at in range(len(known) - len(asked) + 1))


def diverge(chosen: Turns, rejected: Turns, where: str, source: str, system: Fields, **rest: Any) -> PreferenceRow:
    """The row of two whole conversations: the prompt is what they share. They must part at an assistant turn."""
    if chosen == rejected:
        raise Unfit(IDENTICAL)
    n = n_shared(chosen, rejected)
    for turns in (chosen, rejected):
        if turns[n:] and turns[n]["role"] != "assistant":
            raise Unfit(f"chosen and rejected part at a {turns[n]['role']} turn, not at an answer", f"turn {n + 1}")
    return PreferenceRow(with_system(system, chosen[:n]), chosen[n:], rejected[n:], where, source, **rest)


def sharegpt(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"conversations": [{"from", "value"}], "chosen", "rejected"}: the last two are one turn, or a list of turns."""
    need(fields, "conversations", "chosen", "rejected")
    prompt = turns_of(fields["conversations"], "conversations", "user")
    chosen, rejected = (turns_of(fields[key], key, "assistant") for key in ("chosen", "rejected"))
    yield PreferenceRow(with_system(fields, prompt), chosen, rejected, where, source, **judgment_of(fields))


def hh(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """Two transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." that share all but the last answer.

    Where they part earlier, at an answer, the prompt is the shared turns and the completions hold several turns; at a
    human turn the row is bad. Turns of one speaker in a row (8 of hh-rlhf's 2,312) are one turn, since no chat template
    takes them otherwise.
    """
    chosen, rejected = (_transcript(text_of(fields, key), key) for key in ("chosen", "rejected"))
    yield diverge(chosen, rejected, where, source, fields, **judgment_of(fields))


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


def token_ids(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"}: lists of token ids, taken as they are. `chosen_counts` and
    `rejected_counts`, lists of 0 and 1 as long as their ids: which of a completion's tokens the loss counts."""
    judgment = judgment_of({key: value for key, value in fields.items() if key != "tools"})
    prompt, chosen, rejected = (ids_of(fields, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    yield TokenizedPair(prompt, chosen, rejected, where, source, judgment["strength"], judgment["weight"],
                        chosen_counts=counts_of(fields, "chosen_counts", chosen),
                        rejected_counts=counts_of(fields, "rejected_counts", rejected), record=judgment["record"])
