"""Messages → the text of the prompt and of each completion, through a chat template.

The prompt is rendered as at generation time (`add_generation_prompt`), the whole conversation as the template renders
it, and the completion is what the whole has beyond the prompt: an empty think block that a template puts before an
answer is part of the completion, since the model would have to generate it. The one difference that is bridged is white
space at the end of the generation prompt (a template that trims): the completion then begins where the template puts
the first character of an answer. Anything else (a generation prompt that opens <think>, where rendered answers have
none) has no right boundary and is an error.
"""
from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dpo_dist.config.errors import UserError
from dpo_dist.data.fields import Turns, n_shared
from dpo_dist.types import PreferenceRow

PLAIN = "none"                               # data.chat_template=none: plain text, whatever template the tokenizer has
ANSWER = "dpo-dist-answer"                   # placeholder that shows what a template puts around an answer
# the date, for templates that ask for it: tokens must not depend on the day
TODAY = datetime(2024, 7, 26)
# transformers passes no functions to a template, so this one is Jinja; trim_blocks removes the final line break.
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + "".join(
    f" | replace('%{code}', '{TODAY.strftime('%' + code)}')"
    for code in (*"aAbBcdHIjmMpSxXyY", "-d", "-m")) + " }}{% endmacro %}\n"
RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


class TemplateMisfit(Exception):
    """A row that the chat template refuses or renders without a boundary between prompt and completion."""


def template_text(tokenizer: Any, setting: str | None) -> str | None:
    """The Jinja text that `data.chat_template` asks for (null: the tokenizer's own, if any); None for plain text."""
    if tokenizer is None or setting == PLAIN:
        return None
    if setting is None:
        own = tokenizer.chat_template        # of several named templates, get_chat_template picks the default
        return own if own is None or isinstance(own, str) else str(tokenizer.get_chat_template())
    if "{{" in setting or "{%" in setting:
        return setting
    if Path(setting).is_file():
        return Path(setting).read_text()
    raise UserError(f"data.chat_template={setting!r} is neither an existing file nor Jinja text; give one of them, "
                    f"null for the tokenizer's own template, or {PLAIN} for plain text")


@dataclass(frozen=True)
class ChatTemplate:
    tokenizer: Any
    text: str                                # Jinja
    special: tuple[str, ...] = ()            # the tokens that can end a turn
    # what ends an answer: nearly always one token; () where the template has none
    end_of_turn: tuple[str, ...] = ()
    blank_tail: str = ""                     # the white space that the template puts after an answer

    def render(self, turns: Turns, tools: tuple[dict[str, Any], ...] = (), generation: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(
            list(turns), tools=list(tools) or None, chat_template=self.text, add_generation_prompt=generation,
            tokenize=False))

    def split(self, row: PreferenceRow) -> tuple[str, str, str]:
        """(prompt, chosen, rejected) texts; completions end with the end-of-turn token, where the template has one.

        All of a continuation of several turns is completion, the user's and the tools' turns in it included.
        Raises TemplateMisfit.
        """
        prompt = _as_turns(row.prompt, "user")
        chosen, rejected = _as_turns(row.chosen, "assistant"), _as_turns(row.rejected, "assistant")
        # a template that knows nothing of tools would leave them out silently
        if row.tools and "tools" not in self.text:
            raise TemplateMisfit("the row has tools, but the chat template does not show them")
        if "tool_calls" not in self.text and any(turn.get("tool_calls") for turn in prompt + chosen + rejected):
            raise TemplateMisfit("the row has tool calls, but the chat template does not show them")
        try:
            text = self.render(prompt, row.tools, generation=True)
            return (text, self._completion(text, prompt, chosen, row.tools),
                    self._completion(text, prompt, rejected, row.tools))
        except RENDER_ERRORS as error:
            raise TemplateMisfit(f"the chat template refuses the row ({error})") from error

    def _completion(self, prompt_text: str, prompt: Turns, turns: Turns, tools: tuple[dict[str, Any], ...]) -> str:
        whole = self.render(prompt + turns, tools)
        if whole.startswith(prompt_text):
            return self._until_end_of_turn(whole[len(prompt_text):])
        header = self.render((*prompt, {"role": "assistant", "content": ANSWER}), tools).rpartition(ANSWER)[0]
        if header.rstrip() == prompt_text.rstrip() and whole.startswith(header):
            return self._until_end_of_turn(whole[len(header):])
        n = n_shared(whole, prompt_text)
        raise TemplateMisfit("the chat template renders the prompt otherwise once an answer follows: "
                             f"{whole[n:n + 30]!r} where generation has {prompt_text[n:n + 30]!r}")

    def _until_end_of_turn(self, text: str) -> str:
        """The text, cut after its end of turn. Where several special tokens close it, as data may bring its own, the
        first end of turn among them counts."""
        closing: list[tuple[str, int]] = []
        end = text.rstrip()
        while end.endswith(self.special):
            token = max((t for t in self.special if end.endswith(t)), key=len)
            closing.insert(0, (token, len(end)))
            end = end[:-len(token)].rstrip()
        if not closing:
            return text.removesuffix(self.blank_tail)
        tokens, n = tuple(token for token, _ in closing), len(self.end_of_turn)
        first = next((i for i in range(len(tokens)) if n and tokens[i:i + n] == self.end_of_turn), len(tokens) - n)
        return text[:closing[first + n - 1][1]]


def chat_template(tokenizer: Any, setting: str | None) -> ChatTemplate | None:
    """The checked template of a tokenizer and `data.chat_template`, or None for plain text. Raises UserError."""
    text = template_text(tokenizer, setting)
    if text is None:
        return None
    if "strftime_now" in text:
        text = FIXED_DATE + text
    template, named = ChatTemplate(tokenizer, text), "the tokenizer's own" if setting is None else setting[:60]
    trial: Turns = ({"role": "user", "content": "Hello."},)
    try:
        whole = template.render((*trial, {"role": "assistant", "content": ANSWER}))
    except RENDER_ERRORS as error:
        raise UserError(f"data.chat_template ({named}) cannot render one question and its answer: {error}; "
                        "mend it") from error
    header, found, tail = whole.rpartition(ANSWER)
    prompt = template.render(trial, generation=True)
    if not found or not (header.startswith(prompt) or header.rstrip() == prompt.rstrip()):
        thinks = "enable_thinking" in text
        hint = " (this one takes a variable: it may begin with {% set enable_thinking = false %})" if thinks else ""
        raise UserError(f"data.chat_template ({named}) has no boundary between prompt and answer: a prompt for "
                        f"generation ends {prompt[-40:]!r}, but a rendered answer follows {header[-40:]!r}; set "
                        "data.chat_template to a Jinja file that renders conversations as its generation prompts begin "
                        "them" + hint)
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    if not any(token in tail for token in special):
        # some models' end of turn is not marked as special
        special |= {str(token) for token in added if str(token) in tail}
    end_of_turn = _end_of_turn(tail, _tail_within(template, trial), special - {""})
    return ChatTemplate(tokenizer, text, tuple(sorted(special - {""})), end_of_turn, tail[len(tail.rstrip()):])


def _tail_within(template: ChatTemplate, trial: Turns) -> str:
    """What the template puts after an answer that is not the last turn."""
    try:
        return template.render((*trial, {"role": "assistant", "content": ANSWER}, *trial)).rpartition(ANSWER)[2]
    except RENDER_ERRORS:
        return ""


def _end_of_turn(tail: str, tail_within: str, special: set[str]) -> tuple[str, ...]:
    """The special tokens that follow every answer; where there are none, the first that follows the last answer.

    A last answer may be followed by more, which ends the text and not the turn: Phi's "<|end|>" and then
    "<|endoftext|>".
    """
    last = _first_special(tail, special)
    return last[:max(1, n_shared(last, _first_special(tail_within, special)))]


def _first_special(tail: str, special: set[str]) -> tuple[str, ...]:
    """The first special token of a text and those that follow with nothing but white space between."""
    run: list[str] = []
    while found := [token for token in special if token in tail]:
        token = min(found, key=lambda token: (tail.index(token), -len(token)))
        before, _, rest = tail.partition(token)
        if run and before.strip():
            break
        run.append(token)
        tail = rest
    return tuple(run)


def _as_turns(part: Turns | str, role: str) -> Turns:
    return ({"role": role, "content": part},) if isinstance(part, str) else part
