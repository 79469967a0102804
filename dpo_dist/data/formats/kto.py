"""KTO's rows: one answer and whether it is good. Pairs are made of them by prompt, before they are read."""
from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from dpo_dist.data.fields import Fields, Unfit, first_of, need, reserved, yes_or_no
from dpo_dist.data.formats.format import DataRow, NoPair
from dpo_dist.data.formats.free import OF_ANSWER
from dpo_dist.data.formats.judgment import RECORDED, RESERVED, confidence_of, judgment_of
from dpo_dist.data.formats.pairs import pair
from dpo_dist.data.formats.trainers import question_of
from dpo_dist.data.messages import turns_of
from dpo_dist.data.records import BadRow, Record, canonical

LABELS = ("label", "kto_tag")
COMPLETIONS = ("completion", "output", "response")
CHATS = ("messages", "conversations")        # prompt and completion in one: the last turn is the completion
UNPAIRED = "no answer to the same prompt with the other label"


def kto(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"prompt", "completion", "label": true | false}, as `paired` has put two of them together."""
    need(fields, "prompt", "chosen", "rejected")
    yield pair(fields["prompt"], fields["chosen"], fields["rejected"], fields, where, source, **judgment_of(fields))


def is_kto(fields: Fields) -> bool:
    """Also LLaMA-Factory's (instruction, input, output, kto_tag) and ms-swift's (messages, label)."""
    try:
        _one_answer(fields)
    except Unfit:
        return False
    return True


def paired(records: Iterable[Record | BadRow]) -> Iterator[Record | BadRow | NoPair]:
    """Of each prompt, the first good answer with the first bad one, the second with the second, as they come along.

    In memory stays what waits for its other half. What waits at the end is counted, a NoPair each. Of a pair, what both
    rows say is the judgment's; a model, a version, a rating and columns that differ belong to their answers
    (chosen_model, rejected_model); of other names that mean something (weight, tags, annotator, ...) the good answer's
    row decides, and the pair is as sure as both labels: their confidences are multiplied.
    """
    waiting: dict[tuple[bytes, bool], deque[Record]] = {}
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        try:
            prompt, completion, good = _one_answer(record.value)
        except Unfit as unfit:
            yield BadRow(record.where, unfit.reason, unfit.detail)
            continue
        rest = {key: value for key, value in record.value.items()
                if key not in (*LABELS, *COMPLETIONS, *CHATS, "instruction", "input", "history", "chosen", "rejected")}
        context = canonical([prompt, rest.get("system"), rest.get("tools")])
        key = hashlib.blake2b(context, digest_size=16).digest()
        others = waiting.get((key, not good))
        if not others:
            value = {**rest, "prompt": prompt, "completion": completion}
            waiting.setdefault((key, good), deque()).append(Record(record.where, value))
            continue
        other = others.popleft()
        if not others:
            del waiting[key, not good]
        chosen, rejected = (completion, other.value["completion"])[::1 if good else -1]
        mine = {**rest, "prompt": prompt, "completion": completion}
        try:
            about = _of_both(*(mine, other.value)[::1 if good else -1])
        except Unfit as unfit:
            yield BadRow(record.where if good else other.where, unfit.reason, unfit.detail)
            continue
        yield Record(record.where if good else other.where, {**about, "chosen": chosen, "rejected": rejected}, rows=2,
                     other=other.where if good else record.where)
    for records_left in waiting.values():
        yield from (NoPair(UNPAIRED) for _ in records_left)


def _of_both(good: Fields, bad: Fields) -> Fields:
    """What the rows of both answers say of their pair."""
    both: Fields = {}
    for key in dict.fromkeys((*good, *bad)):
        noun = OF_ANSWER.get(key, key)
        if noun in ("model", "version", "rating"):
            both |= {f"{side}_{noun}": row[key] for side, row in (("chosen", good), ("rejected", bad)) if key in row}
        elif key == "completion" or good.get(key) == bad.get(key):
            both[key] = good[key]
        elif key in RESERVED or key in RECORDED or key == "prompt":
            if key in good:
                both[key] = good[key]
        else:
            both |= {f"{side}_{key}": row[key] for side, row in (("chosen", good), ("rejected", bad)) if key in row}
    sure = [confidence_of(row) for row in (good, bad)]
    if sure != [None, None]:
        both["confidence"] = (sure[0] or 1.0) * (sure[1] or 1.0)
    return both


def _one_answer(fields: Fields) -> tuple[Any, Any, bool]:
    """(prompt, completion, whether it is good) of a row. Raises Unfit."""
    key = first_of(fields, *LABELS)
    good = yes_or_no(fields[key])
    if good is None:
        raise Unfit(f"{key} is neither true nor false", reserved(key, repr(fields[key])[:40]))
    asked = next((k for k in ("prompt", "instruction", "question") if k in fields), None)
    if asked:
        return question_of(fields, asked), fields[first_of(fields, *COMPLETIONS)], good
    chat_key = first_of(fields, *CHATS, "completion")
    chat = list(turns_of(fields[chat_key], chat_key, "assistant"))
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        answer = next((k for k in COMPLETIONS if k in fields and k != chat_key), None)
        if answer is None:
            raise Unfit(f"{chat_key} does not end with an assistant turn, the answer that is judged")
        return chat, fields[answer], good
    return chat[:-1], chat[-1:], good
