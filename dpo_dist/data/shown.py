"""Whether the rendered texts show all that a row says. A chat template may leave out a role, a field or a piece of a
text without a word; what is left out of a completion would not be trained on.

Two looks, which together are cheap. What a template does with a kind of row (its turns' roles, and which fields they
have) is found once, by rendering a row of the same kind whose texts are placeholders. What it does with a text (cutting
it at </think>) is found by searching for the text itself. One thing may be left out: the thinking in the prompt's
earlier answers, since templates cut it there at generation too.
"""
from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

from dpo_dist.data.chat import ChatTemplate, RowTexts, TemplateMisfit
from dpo_dist.data.fields import Turns
from dpo_dist.data.frame import as_turns, without_closing
from dpo_dist.types import Message, PreferenceRow

REASONING = ("reasoning_content", "thinking", "reasoning")       # names of one thing; transformers fills in the others
TEXT_FIELDS = ("content", *REASONING, "tool_plan", "refusal")
# what ends thinking that stands in front of an answer's text, in the spelling of several families
END_OF_THINKING = re.compile(r"</think(?:ing)?>|</thought>|</reasoning>|\[/THINK\]")
THINKING_TAGS = re.compile(r"</?think(?:ing)?>|</?thought>|</?reasoning>|\[/?THINK\]")
NAMED_IN_SCHEMA = ("name", "description", "enum")


class Said(NamedTuple):
    """One thing that a row says."""

    part: str                                # prompt, chosen or rejected: the text in which it must stand
    turn: int                                # from 0; -1: tools or documents, which belong to no turn
    role: str
    field: str
    text: str

    @property
    def place(self) -> tuple[str, int, str]:
        return self.part, self.turn, self.field

    @property
    def what(self) -> str:
        return self.field + (f" of {self.role} turns" if self.role else "")

    @property
    def kind(self) -> str:
        """What such rows are counted by."""
        where = "the prompt" if self.part == "prompt" else "a completion"
        return f"the chat template leaves out {self.what} in {where}"


@dataclass
class Shown:
    """What a template shows of rows, with what was found of their kinds so far."""

    template: ChatTemplate
    # {kind of row: (part, turn, field) of what is left out}
    of_kinds: dict[Any, frozenset[tuple[str, int, str]]] = field(default_factory=dict)
    of_schemas: dict[str, tuple[Said, ...]] = field(default_factory=dict)

    def missing(self, row: PreferenceRow, texts: RowTexts) -> tuple[Said, ...]:
        """What the row says and the texts do not show."""
        kind = _kind_of_row(row)
        if kind not in self.of_kinds:
            self.of_kinds[kind] = self._left_out_of_kind(row)
        found = self._not_shown(_sayings(row), texts, self.of_kinds[kind])
        for name, value in _schemas(row).items():
            key = name + json.dumps(value, sort_keys=True, default=str)
            if key not in self.of_schemas:           # many rows have the same tools: each set is sought once
                sayings = _sayings_of_schema(name, value)
                self.of_schemas[key] = tuple(self._not_shown(sayings, texts, self.of_kinds[kind]))
            found += self.of_schemas[key]
        return tuple(found)

    def _left_out_of_kind(self, row: PreferenceRow) -> frozenset[tuple[str, int, str]]:
        trial = _trial(row)
        try:
            texts = self.template.split(trial)
        except TemplateMisfit:                       # it looks into the texts: nothing is known of this kind
            return frozenset()
        sayings = [*_sayings(trial), *(said for name, value in _schemas(trial).items()
                                       for said in _sayings_of_schema(name, value))]
        return frozenset(said.place for said in self._not_shown(sayings, texts))

    def _not_shown(self, sayings: Iterable[Said], texts: RowTexts,
                   left_out: Collection[tuple[str, int, str]] = ()) -> list[Said]:
        """What the texts do not show: what does not stand in them and, where all else does, one thing for each place
        that the template is known to leave out, since the same words may stand elsewhere by chance."""
        sayings = list(sayings)
        rendered = {"prompt": texts.prompt, "chosen": texts.chosen.text, "rejected": texts.rejected.text}
        # an end of turn that a text brings along is replaced by the template's
        missing = [said for said in sayings
                   if not shows(rendered[said.part], without_closing(said.text, self.template.special))]
        known = {said.place: said for said in reversed(sayings) if said.place in left_out}
        return missing + [said for place, said in known.items() if place not in {m.place for m in missing}]


def shows(rendered: str, text: str) -> bool:
    """Whether a text stands in what was rendered: as it is, as JSON, or line by line; white space around it and around
    thinking tags may differ."""
    text = text.strip()
    if text in rendered:
        return True
    if any(json.dumps(text, ensure_ascii=ascii)[1:-1] in rendered for ascii in (False, True)):
        return True
    pieces = [line.strip() for piece in THINKING_TAGS.split(text) for line in piece.splitlines()]
    at = 0
    for piece in pieces:                     # in order, each after the one before
        at = rendered.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def _parts(row: PreferenceRow) -> dict[str, Turns]:
    return {"prompt": as_turns(row.prompt, "user"), "chosen": as_turns(row.chosen, "assistant"),
            "rejected": as_turns(row.rejected, "assistant")}


def _sayings(row: PreferenceRow) -> Iterator[Said]:
    """All that the row's turns must show."""
    for part, turns in _parts(row).items():
        for i, turn in enumerate(turns):
            earlier_answer = part == "prompt" and turn["role"] == "assistant"
            for name in TEXT_FIELDS:
                text = turn.get(name)
                if not isinstance(text, str) or (earlier_answer and name in REASONING):
                    continue
                if earlier_answer and name == "content":
                    text = END_OF_THINKING.split(text)[-1]
                if text.strip():
                    yield Said(part, i, turn["role"], name, text)
            for call in turn.get("tool_calls") or ():
                for text in _leaves({call["function"]["name"]: call["function"].get("arguments")}):
                    yield Said(part, i, turn["role"], "tool_calls", text)


def _sayings_of_schema(name: str, value: Any) -> Iterator[Said]:
    leaves = _schema_texts(value) if name == "tools" else _leaves(value, keys=False)
    return (Said("prompt", -1, "", name, text) for text in leaves if text.strip())


def _schemas(row: PreferenceRow) -> dict[str, Any]:
    """What a row shows the model besides its turns."""
    given = {"tools": list(row.tools), "documents": row.template_kwargs.get("documents")}
    return {name: value for name, value in given.items() if value}


# ------------------------------------------------------------------------------------------------------- kinds of rows


def _kind_of_row(row: PreferenceRow) -> tuple[Any, ...]:
    variables = json.dumps(row.template_kwargs, sort_keys=True, default=str) if row.template_kwargs else ""
    return (*(tuple(map(_kind_of_turn, turns)) for turns in _parts(row).values()), bool(row.tools), variables)


def _kind_of_turn(turn: Message) -> tuple[Any, ...]:
    """A turn's role, which of its fields say something, and how its text is cut by thinking tags."""
    content = turn.get("content") or ""
    tags = tuple(THINKING_TAGS.findall(content)) if "<" in content or "[" in content else ()
    return (turn["role"], tuple(bool(turn.get(name)) for name in TEXT_FIELDS), tags,
            bool(END_OF_THINKING.split(content)[-1].strip()) if tags else None, len(turn.get("tool_calls") or ()))


def _trial(row: PreferenceRow) -> PreferenceRow:
    """A row of the same kind that says placeholders. What is left as it is (roles, ids, types) templates may check."""
    prompt, chosen, rejected = (tuple(_trial_turn(turn, f"{part}{i}") for i, turn in enumerate(turns))
                                for part, turns in _parts(row).items())
    numbers = count()
    variables = dict(row.template_kwargs)
    if variables.get("documents"):
        variables["documents"] = _trial_texts(variables["documents"], numbers)
    return replace(row, prompt=prompt, chosen=chosen, rejected=rejected, template_kwargs=variables,
                   tools=tuple(_trial_schema(tool, numbers) for tool in row.tools))


def _trial_turn(turn: Message, name: str) -> Message:
    out = dict(turn)
    for key in TEXT_FIELDS:
        text = turn.get(key)
        if isinstance(text, str) and text:
            pieces = THINKING_TAGS.split(text)
            tags = [*THINKING_TAGS.findall(text), ""]
            out[key] = "".join((f"dpo{name}{key}{i}" if piece.strip() else piece) + tag
                               for i, (piece, tag) in enumerate(zip(pieces, tags, strict=True)))
    if turn.get("tool_calls"):
        out["tool_calls"] = [
            {**call, "function": {**call["function"], "name": f"dpo{name}call{i}",
                                  "arguments": {f"dpo{name}key{i}": f"dpo{name}value{i}"}}}
            for i, call in enumerate(turn["tool_calls"])]
    return out


def _trial_texts(value: Any, numbers: Iterator[int]) -> Any:
    """The same JSON value with a placeholder for every text."""
    if isinstance(value, dict):
        return {key: _trial_texts(inner, numbers) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_trial_texts(inner, numbers) for inner in value]
    return f"dpoword{next(numbers)}" if isinstance(value, str) and value.strip() else value


def _trial_schema(value: Any, numbers: Iterator[int]) -> Any:
    """The same tool schema with a placeholder for every text that _schema_texts finds."""
    if isinstance(value, list | tuple):
        return [_trial_schema(inner, numbers) for inner in value]
    if not isinstance(value, dict):
        return value
    out: dict[str, Any] = {}
    for key, inner in value.items():
        if _names_parameters(key, inner):
            names = {name: f"dpoparameter{next(numbers)}" for name in inner}
            out[key] = {names[name]: _trial_schema(schema, numbers) for name, schema in inner.items()}
            if isinstance(value.get("required"), list):
                out["required"] = [names.get(name, name) for name in value["required"]]
        elif key in NAMED_IN_SCHEMA:
            out[key] = _trial_texts(inner, numbers)
        elif key not in out:
            out[key] = _trial_schema(inner, numbers)
    return out


# ------------------------------------------------------------------------------------------------- texts within values


def _leaves(value: Any, keys: bool = True) -> Iterator[str]:
    """Every text within a JSON value, and every name where `keys`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if keys:
                yield key
            yield from _leaves(inner, keys)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, keys)
    elif isinstance(value, str) and value.strip():
        yield value


def _schema_texts(value: Any) -> Iterator[str]:
    """The names, descriptions and allowed values within tool schemas: what a model must see to call them. Words of JSON
    Schema itself (type, required) are spelled as a template likes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if _names_parameters(key, inner):
                for name, schema in inner.items():
                    yield name
                    yield from _schema_texts(schema)
            elif key in NAMED_IN_SCHEMA:
                yield from _leaves(inner)
            elif key != "required":
                yield from _schema_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _schema_texts(inner)


def _names_parameters(key: str, value: Any) -> bool:
    """Whether the keys of this part of a tool schema are parameters' names."""
    return (key in ("properties", "parameters") and isinstance(value, dict) and bool(value)
            and all(isinstance(inner, dict) for inner in value.values()) and "properties" not in value)
