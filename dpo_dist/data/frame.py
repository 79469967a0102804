"""What a chat template puts around the turns, by which a text that was rendered already is known."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from dpo_dist.data.fields import Turns, n_shared
from dpo_dist.types import PreferenceRow

QUESTION, ANSWER = "dpo-dist-question", "dpo-dist-answer"    # placeholders for what a user and an assistant say


@dataclass(frozen=True)
class Frame:
    """The texts that a template writes itself. Where a row holds one, it would stand there twice."""

    special: tuple[str, ...] = ()            # the tokens that can end a turn
    marks: tuple[str, ...] = ()              # the special tokens that the template writes
    openings: tuple[str, ...] = ()           # what a rendered prompt begins with: BOS, the header of a user's turn
    ending: str = ""                         # what a rendered prompt ends with
    answer_header: str = ""                  # what a rendered answer begins with

    def sign_of_rendering(self, row: PreferenceRow) -> str | None:
        """What shows that a part of the row was rendered before ("prompt holds '<|user|>'"), or None.

        A text must not hold the template's special tokens at all, a message must not begin as rendered ones do.
        """
        if isinstance(row.prompt, str):
            for mark in self.marks:
                if mark in row.prompt:
                    return f"prompt holds {mark!r}"
            if self.ending and row.prompt.rstrip().endswith(self.ending):
                return f"prompt ends with {self.ending!r}"
        for turn in as_turns(row.prompt, "user"):
            for opening in (*self.openings, *self.marks):    # a header may name a day, a mark is always the same
                if turn["content"].lstrip().startswith(opening):
                    return f"prompt begins with {opening!r}"
        return self._sign_in_answer("chosen", row.chosen) or self._sign_in_answer("rejected", row.rejected)

    def _sign_in_answer(self, name: str, answer: Turns | str) -> str | None:
        if isinstance(answer, str):          # its own end of turn is no fault
            inner = without_closing(answer, self.special)
            if found := next((mark for mark in self.marks if mark in inner), None):
                return f"{name} holds {found!r}"
        first = as_turns(answer, "assistant")[0]["content"]
        if self.answer_header and first.lstrip().startswith(self.answer_header):
            return f"{name} begins with {self.answer_header!r}"
        return None


def frame_of(tokenizer: Any, prompt: str, whole: str, after_inner: str, with_system: str,
             special: Collection[str]) -> Frame:
    """The frame, from renderings of QUESTION and ANSWER: the prompt, both turns, what follows an answer after which the
    question comes again, and a prompt whose system turn says ANSWER (the last two are empty where the template refuses
    them)."""
    first, _, ending = prompt.partition(QUESTION)
    inner = after_inner.partition(QUESTION)[0]
    of_every_user_turn = first[len(first) - n_shared(first[::-1], inner[::-1]):]
    bos = tokenizer.bos_token or ""
    user_header = _without_end(_from_first_token(of_every_user_turn, special), inner.strip(), special)
    headers = [first, user_header, with_system.partition(ANSWER)[0]]
    openings = {header.strip().removeprefix(bos).strip() for header in headers} | {bos}
    marks = [token for token in special if token in whole or token in prompt]
    return Frame(tuple(sorted(special)), tuple(sorted(marks)), tuple(sorted(openings - {""}, key=len, reverse=True)),
                 ending.strip(), _without_end(ending.strip(), inner.strip(), special))


def _from_first_token(text: str, special: Collection[str]) -> str:
    """The text from its first special token on, or all of it: what two texts share may begin amid a token."""
    return text[min((text.index(token) for token in special if token in text), default=0):]


def _without_end(ending: str, after_answer: str, special: Collection[str]) -> str:
    """The header of an answer: what ends a prompt, without the end of the user's turn (which also ends an answer)."""
    for token in sorted(special, key=len, reverse=True):
        if ending.startswith(token) and after_answer.startswith(token):
            return ending.removeprefix(token).strip()
    return ending


def closing_token(text: str, special: tuple[str, ...]) -> str | None:
    """The special token that the text ends with, or None."""
    return max((t for t in special if text.endswith(t)), key=len) if text.endswith(special) else None


def without_closing(text: str, special: tuple[str, ...]) -> str:
    """The text without the special tokens, and the white space, at its end."""
    text = text.rstrip()
    while token := closing_token(text, special):
        text = text[:-len(token)].rstrip()
    return text


def from_last(text: str, marks: Iterable[str]) -> str:
    """The text from the last of these marks on; empty where it has none."""
    at = max((text.rfind(mark) for mark in marks), default=-1)
    return text[at:] if at >= 0 else ""


def as_turns(part: Turns | str, role: str) -> Turns:
    """Messages: as given, or one turn that says a text."""
    return ({"role": role, "content": part},) if isinstance(part, str) else part
