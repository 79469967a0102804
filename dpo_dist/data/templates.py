"""Which chat template renders a row, checked: the tokenizer's own, one of its several named ones, or one given by
`data.chat_template`."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError

from dpo_dist.config.errors import UserError
from dpo_dist.data.chat import RENDER_ERRORS, ChatTemplate
from dpo_dist.data.fields import Turns, n_shared
from dpo_dist.data.frame import ANSWER, QUESTION, frame_of
from dpo_dist.runtime.json_files import needed_object
from dpo_dist.types import PreferenceRow

PLAIN = "none"                               # data.chat_template=none: plain text, whatever template the tokenizer has
DEFAULT, TOOL_USE = "default", "tool_use"    # names that transformers chooses by itself
CALL = {"type": "function", "id": "call00001", "function": {"name": "dpo-dist-call", "arguments": {}}}
# the date, for templates that ask for it: tokens must not depend on the day
TODAY = datetime(2024, 7, 26)
# transformers passes no functions to a template, so this one is Jinja; trim_blocks removes the final line break.
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + "".join(
    f" | replace('%{code}', '{TODAY.strftime('%' + code)}')"
    for code in (*"aAbBcdHIjmMpSxXyY", "-d", "-m")) + " }}{% endmacro %}\n"


def template_texts(tokenizer: Any, setting: str | None) -> dict[str, str] | None:
    """{name: Jinja text} of the templates that `data.chat_template` allows; None for plain text.

    "default" renders every row, and "tool_use", where there is one, those with tools, as in transformers. A template
    that the setting names or gives is the only one.
    """
    if tokenizer is None or setting == PLAIN:
        return None
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if setting is None:
        if own is None or isinstance(own, str):
            return None if own is None else {DEFAULT: own}
        if DEFAULT not in named:
            raise UserError(f"the tokenizer has several chat templates ({', '.join(named)}) and none is called "
                            f"{DEFAULT}; set data.chat_template to one of these names")
        return {name: named[name] for name in (DEFAULT, TOOL_USE) if name in named}
    text = named.get(setting) or given_text(tokenizer, setting)
    if text is not None:
        return {DEFAULT: text}
    names = f", the name of one of the tokenizer's own ({', '.join(named)})" if named else ""
    raise UserError(f"data.chat_template={setting!r} is neither an existing file nor Jinja text; give one of "
                    f"them{names}, null for the tokenizer's own template, or {PLAIN} for plain text")


def given_text(tokenizer: Any, setting: str | None) -> str | None:
    """The Jinja text that `data.chat_template` itself gives, as text or as a file; None where it does not."""
    if setting is None or setting == PLAIN or (isinstance(getattr(tokenizer, "chat_template", None), dict)
                                               and setting in tokenizer.chat_template):
        return None
    if is_jinja(setting):
        return setting
    return Path(setting).read_text() if Path(setting).is_file() else None


def is_jinja(setting: str) -> bool:
    """Whether `data.chat_template` is a template itself, not a file or a name."""
    return "{{" in setting or "{%" in setting


def described(setting: str | None, name: str, several: bool) -> str:
    """How messages call a template."""
    own = "the tokenizer's own" + (f" '{name}'" if several else "")
    return own if setting is None else setting[:60].replace("\n", " ")


def with_fixed_date(text: str) -> str:
    """The template's text, which always sees the same day."""
    return FIXED_DATE + text if "strftime_now" in text else text


@dataclass(frozen=True)
class ChatTemplates:
    """The templates of a run's rows."""

    default: ChatTemplate
    tool_use: ChatTemplate | None = None     # for rows with tools, where the tokenizer has one of that name

    def of(self, row: PreferenceRow) -> ChatTemplate:
        return self.tool_use if self.tool_use is not None and row.tools else self.default

    @property
    def ask_for_date(self) -> bool:
        return any("strftime_now" in t.text for t in (self.default, self.tool_use) if t is not None)


def chat_templates(tokenizer: Any, setting: str | None, variables: Mapping[str, Any] | None) -> ChatTemplates | None:
    """The checked templates of a tokenizer, `data.chat_template` and `data.chat_template_kwargs`; None for plain text.
    Raises UserError."""
    texts = template_texts(tokenizer, setting)
    if texts is None:
        if variables:
            raise UserError("data.chat_template_kwargs are given, but there is no chat template; remove them, or set "
                            "data.chat_template")
        return None
    checked = {name: _checked(ChatTemplate(tokenizer, with_fixed_date(text), described(setting, name, len(texts) > 1),
                                           variables or {})) for name, text in texts.items()}
    return ChatTemplates(checked[DEFAULT], checked.get(TOOL_USE))


def _checked(template: ChatTemplate) -> ChatTemplate:
    """The template with what one question and its answer show of it."""
    if _has_powers(template.text):                       # nothing ends 10 ** 10 ** 10 once it is begun
        raise UserError(f"data.chat_template ({template.name}) computes a power (**), which no conversation needs; "
                        "take it out")
    question = {"role": "user", "content": QUESTION}
    answers = [{"role": "assistant", "content": ANSWER}]
    # some templates suit no others: their generation prompts open <think>
    answers += [{**answers[0], "reasoning_content": "dpo-dist-thought"},
                {**answers[0], "content": f"<think>\ndpo-dist-thought\n</think>\n\n{ANSWER}"}]
    # templates of models that also see images may want a list of parts where others have a text
    tried = [replace(template, in_parts=in_parts) for in_parts in (False, True)]
    renderings = []
    for candidate, answer in product(tried, answers):
        try:
            renderings.append((candidate, candidate.render((question,), generation=True),
                               candidate.render((question, answer))))
        except RENDER_ERRORS as error:
            refused = error
    if not renderings:
        raise UserError(f"data.chat_template ({template.name}) cannot render one question and its answer: {refused}; "
                        "mend it") from refused
    fitting = [entry for entry in renderings if QUESTION in entry[1] and _has_boundary(*entry[1:])]
    if not fitting:
        raise _without_boundary(template, *renderings[0][1:])
    template, prompt, whole = fitting[0]
    tail = whole.rpartition(ANSWER)[2]
    special = _special(template.tokenizer, tail)
    within = _rendered_or_empty(template, (question, answers[0], question)).rpartition(ANSWER)[2]
    with_system = _rendered_or_empty(template, ({"role": "system", "content": ANSWER}, question))
    end_of_turn = _end_of_turn(tail, within, special)
    call = (question, {**answers[0], "content": "", "tool_calls": [CALL]})
    in_text = not _rendered_or_empty(template, call) and bool(
        _rendered_or_empty(replace(template, arguments_in_text=True), call))
    return replace(template, arguments_in_text=in_text, end_of_turn=end_of_turn, blank_tail=tail[len(tail.rstrip()):],
                   stops=("", "") if end_of_turn else _stops(template, (question, answers[0]), special),
                   frame=frame_of(template.tokenizer, prompt, whole, within, with_system, special))


def _has_powers(text: str) -> bool:
    """Whether ** stands between two values; after a bracket or a comma it unpacks arguments."""
    try:
        signs = [sign for _, kind, sign in Environment().lex(text) if kind != "whitespace"]
    except TemplateError:                                # said when it is rendered
        return False
    return any(sign == "**" and before not in ("(", ",") for before, sign in pairwise(signs))


def _has_boundary(prompt: str, whole: str) -> bool:
    header, found, _ = whole.rpartition(ANSWER)
    return bool(found) and (header.startswith(prompt) or header.rstrip() == prompt.rstrip())


def _without_boundary(template: ChatTemplate, prompt: str, whole: str) -> UserError:
    return UserError(f"data.chat_template ({template.name}) has no boundary between prompt and answer: a prompt for "
                     f"generation ends {prompt[-40:]!r}, but a rendered answer follows "
                     f"{whole.rpartition(ANSWER)[0][-40:]!r}; set data.chat_template to a Jinja file that renders "
                     f"conversations as its generation prompts begin them{template.hint(prompt)}")


def _special(tokenizer: Any, tail: str) -> set[str]:
    """The tokenizer's special tokens; where what follows an answer has none of them, also the added ones in it, since
    some models' end of turn is not marked as special."""
    added = tokenizer.added_tokens_decoder.values()
    special = ({str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)) - {""}
    if not any(token in tail for token in special):
        special |= {str(token) for token in added if str(token) and str(token) in tail}
    return special


def _stops(template: ChatTemplate, turns: Turns, special: set[str]) -> tuple[str, str]:
    """The special tokens that begin the turn after an answer and after a tool call, where generation stops at them:
    some models (GLM) have no other end of turn."""
    at_stop = stop_tokens(template.tokenizer)
    called = ({**turns[-1], "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": QUESTION})
    found = []
    for following in ((*turns, turns[0]), (*turns[:-1], *called)):
        whole = _rendered_or_empty(template, following)
        before = _rendered_or_empty(template, following[:-1])
        begins = whole[n_shared(whole, before):].lstrip()
        found.append(next((token for token in special & at_stop if begins.startswith(token)), ""))
    return found[0], found[1]


def stop_tokens(tokenizer: Any) -> set[str]:
    """The tokens at which generation stops, from the generation_config.json beside the tokenizer."""
    ids = eos_ids(Path(tokenizer.name_or_path) / "generation_config.json")
    return set(tokenizer.convert_ids_to_tokens(sorted(ids))) - {None}


def eos_ids(file: Path) -> set[int]:
    """What a config.json or generation_config.json says of eos_token_id; none where it is not there. UserError where it
    is damaged."""
    if not file.is_file():
        return set()
    ids = needed_object(file, "copy the model again").get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) for token in listed):
        raise UserError(f"{file}: eos_token_id={ids} is no token id; copy the model again")
    return set(listed)


def _rendered_or_empty(template: ChatTemplate, turns: Turns) -> str:
    try:
        return template.render(turns)
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
