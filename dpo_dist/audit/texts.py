"""A row's texts as an audit compares them: content hashes, words, openings, and what stands in them."""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from zlib import crc32

from dpo_dist.data.writer import hash64
from dpo_dist.types import Message, PreferenceRow

# a letter of a script without spaces is a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
EMPTY_THINK = re.compile(r"<(think|thinking|reasoning)>\s*</\1>")
OPENING_WORDS = 2
# control tokens of the common chat templates, whatever the tokenizer at hand
KNOWN_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|begin_of_text|>", "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
               "<|system|>", "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "</s>", "<|START_OF_TURN_TOKEN|>",
               "<|END_OF_TURN_TOKEN|>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
# special in some tokenizers, and ordinary in answers
ORDINARY = re.compile(r"</?(think|thinking|reasoning|tool_call|tool_response|tools?|answer)>|<unk>|\[UNK\]|\W|\w+")


def said(part: tuple[Message, ...] | str) -> str:
    """All that is said in a prompt or an answer, turn after turn."""
    if isinstance(part, str):
        return part
    return "\n".join(str(turn.get("content") or "") for turn in part)


def content_hash(part: tuple[Message, ...] | str) -> int:
    """64 bits of a prompt or an answer: roles, calls and reasoning count, white space between words does not."""
    if isinstance(part, str):
        return hash64(" ".join(part.split()).encode(errors="replace"))
    plain = [{**turn, "content": " ".join(str(turn.get("content") or "").split())} for turn in part]
    return hash64(json.dumps(plain, sort_keys=True, default=str).encode(errors="replace"))


def prompt_hash(row: PreferenceRow) -> int:
    """As content_hash; one turn of a user is the same as a text."""
    prompt = row.prompt
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].get("role") == "user" and not row.tools:
        return content_hash(said(prompt))
    if row.tools:
        return hash64(content_hash(prompt).to_bytes(8, "little") + json.dumps(row.tools, default=str).encode())
    return content_hash(prompt)


def answer_hash(part: tuple[Message, ...] | str) -> int:
    """As content_hash; one turn of an assistant is the same as a text."""
    if not isinstance(part, str) and len(part) == 1 and set(part[0]) <= {"role", "content"}:
        return content_hash(said(part))
    return content_hash(part)


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def loose_hash(words: Sequence[str]) -> int:
    """64 bits of a text's words in order: case, punctuation and white space do not count."""
    return hash64(" ".join(words).encode(errors="replace"))


def word_ids(words: Sequence[str]) -> list[int]:
    """(words,) 32 bits each."""
    return [crc32(word.encode(errors="replace")) for word in words]


def opening_of(text: str) -> str:
    """The first two words of an answer, or "" for one that begins otherwise."""
    return " ".join(text[:80].casefold().split()[:OPENING_WORDS]).rstrip(".,:;!?")


def has_empty_reasoning(part: tuple[Message, ...] | str) -> bool:
    """Whether reasoning stands in an answer with nothing in it."""
    text = said(part)
    if "<" in text and EMPTY_THINK.search(text):
        return True
    return not isinstance(part, str) and any(
        isinstance(turn.get(key), str) and not turn[key].strip()
        for turn in part if turn.get("role") == "assistant" for key in ("reasoning_content", "thinking"))


def marks_pattern(special: Sequence[str], rendered: bool) -> re.Pattern[str]:
    """What finds control tokens that do not belong into a text: the common ones, and a tokenizer's own special ones,
    but those that answers hold. rendered: texts are written as the tokenizer sees them, so its own ones are meant."""
    own = {mark for mark in special if len(mark) > 2 and not ORDINARY.fullmatch(mark)}
    marks = {*KNOWN_MARKS} - own if rendered else {*KNOWN_MARKS} | own
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
