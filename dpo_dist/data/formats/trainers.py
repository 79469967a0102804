"""Formats of other trainers' files: OpenAI, ms-swift, LLaMA-Factory, axolotl."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_dist.data.fields import Fields, Turns, Unfit, first_of, from_json, need, reserved, sound_text, text_of
from dpo_dist.data.formats.format import DataRow
from dpo_dist.data.formats.judgment import judgment_of
from dpo_dist.data.formats.pairs import diverge, pair
from dpo_dist.data.messages import called, turn_of, turns_of, with_system
from dpo_dist.types import Message, PreferenceRow


def openai(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}."""
    need(fields, "input", "preferred_output", "non_preferred_output")
    given = from_json(fields["input"], "input", dict)
    need(given, "messages")
    tools = given.get("tools") or [{"type": "function", "function": f} for f in given.get("functions") or []]
    prompt = turns_of(given["messages"], "input.messages", "user")
    chosen, rejected = (turns_of(fields[key], key, "assistant") for key in ("preferred_output", "non_preferred_output"))
    yield PreferenceRow(with_system(fields, prompt), chosen, rejected, where, source,
                        **judgment_of({**fields, "tools": tools} if tools else fields))


def swift(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"messages", "rejected_response"}: the last of the messages is the chosen answer; or {"messages",
    "rejected_messages"}: two whole chats. Instead of messages also `query` or `instruction` with `response` or
    `output`, and `history`."""
    judgment = judgment_of(fields)
    if "messages" not in fields:
        answer = first_of(fields, "response", "output")
        yield asked(fields, first_of(fields, "query", "instruction"), answer, "rejected_response", where, source)
        return
    chat = _one_turn_of_calls(turns_of(fields["messages"], "messages", "user", _swift_turn))
    if "rejected_messages" in fields:
        rejected = _one_turn_of_calls(turns_of(fields["rejected_messages"], "rejected_messages", "user", _swift_turn))
        if rejected and rejected[0]["role"] == "assistant":
            yield _after_the_prompt(fields, chat, rejected, where, source, judgment)
        else:
            yield diverge(chat, rejected, where, source, fields, **judgment)
        return
    need(fields, "rejected_response")
    rejected = _one_turn_of_calls(turns_of(fields["rejected_response"], "rejected_response", "assistant", _swift_turn))
    yield _after_the_prompt(fields, chat, rejected, where, source, judgment)


def _after_the_prompt(fields: Fields, chat: Turns, rejected: Turns, where: str, source: str,
                      judgment: dict[str, Any]) -> PreferenceRow:
    if not chat or chat[-1]["role"] != "assistant":
        raise Unfit("messages does not end with an assistant turn, the chosen answer")
    return PreferenceRow(with_system(fields, chat[:-1]), chat[-1:], rejected, where, source, **judgment)


def _swift_turn(turn: Any, key: str) -> Message:
    """An ordinary message, or swift's roles tool_call and tool_response."""
    role = turn.get("role") if isinstance(turn, dict) else None
    if role == "tool_call":
        return called(sound_text(turn.get("content"), f"{key}'s content"), key)
    return turn_of({**turn, "role": "tool"} if role == "tool_response" else turn, key)


def _one_turn_of_calls(turns: Turns) -> Turns:
    """The turns with calls that follow one another in one turn, as templates take parallel calls."""
    merged: list[Message] = []
    for turn in turns:
        if merged and "tool_calls" in turn and "tool_calls" in merged[-1] and not turn["content"]:
            merged[-1] = {**merged[-1], "tool_calls": [*merged[-1]["tool_calls"], *turn["tool_calls"]]}
        else:
            merged.append(turn)
    return tuple(merged)


def alpaca(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """LLaMA-Factory's {"instruction", "input", "chosen", "rejected"}, with `system` and `history` where given."""
    yield asked(fields, "instruction", "chosen", "rejected", where, source)


def axolotl(fields: Fields, where: str, source: str) -> Iterator[DataRow]:
    """{"instruction" | "question" | "prompt" | "input", "chosen_response", "rejected_response"}, or with `chosen` and
    `rejected`."""
    yield asked(fields, first_of(fields, "instruction", "question", "prompt", "input"),
                first_of(fields, "chosen_response", "chosen"), first_of(fields, "rejected_response", "rejected"),
                where, source)


def asked(fields: Fields, question: str, chosen: str, rejected: str, where: str, source: str) -> PreferenceRow:
    """The row of a question (a line of `input` below it, `history` before it) and two answers; by their fields."""
    need(fields, question, chosen, rejected)
    prompt = question_of(fields, question)
    return pair(prompt, fields[chosen], fields[rejected], fields, where, source, **judgment_of(fields))


def question_of(fields: Fields, key: str) -> Any:
    """A question's text or chat, with the row's `input` and `history`."""
    question = fields[key]
    if isinstance(question, str) and key not in ("prompt", "input") and fields.get("input"):
        if not isinstance(fields["input"], str):
            raise Unfit("input is not text", reserved("input", type(fields["input"]).__name__))
        question = f"{question}\n{fields['input']}"
    history = fields.get("history")
    if not history or not isinstance(history, list):
        return question
    before: list[Message] = []
    for exchange in history:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise Unfit("history is not a list of [question, answer]", repr(exchange)[:60])
        before += [{"role": role, "content": text_of({"history": text}, "history")}
                   for role, text in zip(("user", "assistant"), exchange, strict=True)]
    return [*before, *turns_of(question, key, "user")]
