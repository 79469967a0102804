"""Messages → the text of the prompt and of each completion, through a chat template.

The prompt is rendered as at generation time (`add_generation_prompt`), the whole conversation as the template renders
it, and the completion is what the whole has beyond the prompt: an empty think block that a template puts before an
answer is part of the completion, since the model would have to generate it. The one difference that is bridged is white
space at the end of the generation prompt (a template that trims): the completion then begins where the template puts
the first character of an answer. Anything else (a generation prompt that opens <think>, where a rendered answer does
not begin with it) has no right boundary and is an error.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from dpo_dist.data.fields import Turns, n_shared
from dpo_dist.data.frame import ANSWER, Frame, as_turns, closing_token, from_last, without_closing
from dpo_dist.data.in_time import in_time
from dpo_dist.types import Message, PreferenceRow

NEXT = "\ue000"                              # begins a placeholder for what follows an answer: no text begins with it
# what a template's own faults raise; one that asks for more memory than there is among them
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
                 MemoryError)
RENDER_SECONDS = 10.0                        # for a conversation; a template that takes longer goes round for ever


class TemplateMisfit(Exception):
    """A row that the chat template refuses, renders without a boundary between prompt and completion, or in part."""

    def __init__(self, problem: str, reason: str = "does not fit the chat template",
                 remedy: str = "mend the row or data.chat_template", detail: str | None = None):
        super().__init__(problem)
        self.reason, self.remedy = reason, remedy        # reason: by which such rows are counted ...
        self.detail = problem if detail is None else detail          # ... and what is shown beside it


@dataclass(frozen=True)
class Answer:
    """A completion as text."""

    text: str
    closed: bool = False                     # whether it ends with an end of turn
    after: str = "\n"                        # what stands before it in the conversation, at least in part
    # (start, end) of what the assistant says; None: all of it
    own: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class RowTexts:
    prompt: str
    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class ChatTemplate:
    tokenizer: Any
    text: str                                # Jinja
    name: str = ""                           # for messages
    variables: Mapping[str, Any] = field(default_factory=dict)       # data.chat_template_kwargs
    in_parts: bool = False                   # whether a content is [{"type": "text", "text": ...}] to it
    arguments_in_text: bool = False          # whether a tool call's arguments are JSON text to it (DeepSeek V3)
    # what ends an answer: nearly always one token; () where the template has none
    end_of_turn: tuple[str, ...] = ()
    blank_tail: str = ""                     # the white space that the template puts after an answer
    # where it has none: the tokens at which generation stops and the next turn begins, after a text and after a call
    stops: tuple[str, str] = ("", "")
    frame: Frame = field(default_factory=Frame)

    @property
    def special(self) -> tuple[str, ...]:
        """The tokens that can end a turn."""
        return self.frame.special

    def hint(self, prompt: str) -> str:
        """What else to try where no answer goes on from a prompt: the variable that stops it from opening <think>."""
        switch = next((name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", self.text)
                       and name not in self.variables), None)
        return f", or try data.chat_template_kwargs={{{switch}: false}}" if switch and "think" in prompt[-20:] else ""

    def render(self, turns: Turns, row: PreferenceRow | None = None, generation: bool = False) -> str:
        """The turns as text, with the tools and variables of `row`."""
        tools, own = (row.tools, row.template_kwargs) if row else ((), {})
        if self.in_parts:
            turns = tuple({**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns)
        if self.arguments_in_text:
            turns = tuple({**turn, "tool_calls": list(map(_with_text, turn["tool_calls"]))} if "tool_calls" in turn
                          else turn for turn in turns)
        with in_time(RENDER_SECONDS, f"data.chat_template ({self.name})"):
            return str(self.tokenizer.apply_chat_template(
                list(turns), tools=list(tools) or None, chat_template=self.text, add_generation_prompt=generation,
                tokenize=False, **{**self.variables, **own}))

    def split(self, row: PreferenceRow, own: bool = False) -> RowTexts:
        """The row's texts; completions end with the end-of-turn token, where the template has one. `own`: with the
        places of what the assistant says, in a continuation of several turns. Raises TemplateMisfit."""
        if sign := self.frame.sign_of_rendering(row):
            raise TemplateMisfit(
                f"{sign}, as the chat template ({self.name}) writes: the text is rendered already, and would be "
                "rendered again", "is rendered already (data.chat_template=none takes texts as they are)",
                "set data.chat_template=none to take texts as they are, or give the turns' own texts")
        prompt = as_turns(row.prompt, "user")
        try:
            text = self.render(prompt, row, generation=True)
            return RowTexts(text, self._answer(text, prompt, as_turns(row.chosen, "assistant"), row, own),
                            self._answer(text, prompt, as_turns(row.rejected, "assistant"), row, own))
        except RENDER_ERRORS as error:
            raise TemplateMisfit(f"the chat template refuses the row ({error})") from error

    def _answer(self, prompt_text: str, prompt: Turns, turns: Turns, row: PreferenceRow, own: bool) -> Answer:
        whole = self.render(prompt + turns, row)
        start = self._start(whole, prompt_text, prompt, row)
        text = self._until_end_of_turn(whole[start:])
        if not self.end_of_turn:
            text += self._stop(turns[-1])
        closed = bool(self.end_of_turn or self._stop(turns[-1])) and text.endswith(self.special)
        after = from_last(prompt_text, self.frame.marks) or prompt_text[-1:] or "\n"
        if not own or len(turns) == 1:
            return Answer(text, closed, after)
        ends = [0]                           # of the assistant's turns: where it begins and ends, in turn
        for at, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if at:
                before = prompt + turns[:at]
                ends.append(self._start(whole, self.render(before, row, generation=True), before, row) - start)
            ends.append(len(text) if at == len(turns) - 1 else
                        self._end_within(whole, start + ends[-1], prompt + turns[:at + 1], turns[at + 1:], row) - start)
        return Answer(text, closed, after, tuple(zip(ends[::2], ends[1::2], strict=True)))

    def _stop(self, turn: Message) -> str:
        return self.stops[bool(turn.get("tool_calls"))]

    def _start(self, whole: str, before: str, turns: Turns, row: PreferenceRow) -> int:
        """Where in `whole` the answer to `turns` begins; `before`: they as a prompt for generation."""
        if whole.startswith(before):
            return len(before)
        header = self.render((*turns, {"role": "assistant", "content": ANSWER}), row).rpartition(ANSWER)[0]
        if header.rstrip() == before.rstrip() and whole.startswith(header):
            return len(header)
        n = n_shared(whole, before)
        raise TemplateMisfit("the chat template renders the prompt otherwise once an answer follows: "
                             f"{whole[n:n + 30]!r} where generation has {before[n:n + 30]!r}",
                             remedy="mend the row or data.chat_template" + self.hint(before))

    def _end_within(self, whole: str, begin: int, until: Turns, after: Turns, row: PreferenceRow) -> int:
        """Where in `whole` an answer ends that other turns follow: the last of `until`, which begins at `begin`."""
        said = self._until_end_of_turn(self.render(until, row)[begin:])
        if whole.startswith(said, begin):
            stop = self._stop(until[-1])
            return begin + len(said) + (len(stop) if whole.startswith(stop, begin + len(said)) else 0)
        # as the last turn it is rendered otherwise: its end of turn is sought in front of what the next turn says
        other = self.render((*until, *({**turn, "content": NEXT + ANSWER} for turn in after)), row)
        end, limit = "".join(self.end_of_turn), n_shared(whole, other)
        if end and (found := whole.rfind(end, begin, limit)) >= 0:
            return found + len(end)
        said = without_closing(said, self.special)       # the end of a last answer may be a token of its own
        if whole.startswith(said, begin):
            return begin + len(said)
        raise TemplateMisfit("the chat template does not show where an answer in the middle of a completion ends",
                             remedy="mend data.chat_template, or set data.train_on=completion")

    def _until_end_of_turn(self, text: str) -> str:
        """The text, cut after its end of turn. Where several special tokens close it, as data may bring its own, the
        first end of turn among them counts."""
        closing: list[tuple[str, int]] = []
        end = text.rstrip()
        while token := closing_token(end, self.special):
            closing.insert(0, (token, len(end)))
            end = end[:-len(token)].rstrip()
        if not closing:
            return text.removesuffix(self.blank_tail)
        tokens, n = tuple(token for token, _ in closing), len(self.end_of_turn)
        first = next((i for i in range(len(tokens)) if n and tokens[i:i + n] == self.end_of_turn), len(tokens) - n)
        return text[:closing[first + n - 1][1]]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """The tool call with its arguments as JSON text."""
    text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}
