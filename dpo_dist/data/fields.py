"""A row's fields → sound Python values, or Unfit with the reason: text, numbers, messages, tool calls, token ids."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from dpo_dist.types import Message

Fields = dict[str, Any]
Turns = tuple[Message, ...]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "function_call": "assistant", "tool": "tool", "observation": "tool"}


class Unfit(ValueError):
    """A record that is not what its format asks for."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def need(fields: Fields, *keys: str) -> None:
    """Unfit for the first of these keys that is missing."""
    for key in keys:
        if key not in fields:
            raise Unfit(f"{key} is missing", f"fields: {', '.join(fields)}")


def text_of(fields: Fields, key: str) -> str:
    need(fields, key)
    return sound_text(fields[key], key)


def sound_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{key} is not text", type(value).__name__)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, "\\ud83d": no tokenizer takes it
            raise Unfit(f"{key} is not valid Unicode", f"character {error.start + 1}") from None
    return value


def number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unfit(f"{key} is not a number", repr(value)[:40])
    return float(value)


def judgment_of(fields: Fields) -> dict[str, Any]:
    """The optional fields that every format may carry, as PreferenceRow takes them."""
    weight = number(fields.get("weight", 1.0), "weight")
    if weight <= 0:
        raise Unfit("weight is not greater than 0", str(weight))
    if "strength" in fields and "margin" in fields:
        raise Unfit("strength and margin are both given")
    strength = next((number(fields[key], key) for key in ("strength", "margin") if key in fields), None)
    return {"weight": weight, "strength": strength, "record": {"tags": fields["tags"]} if "tags" in fields else {}}


def n_shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many entries at the beginning of both are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ------------------------------------------------------------------------------------------------------------- messages


def turns_of(value: Any, key: str, role_of_text: str, turn: Callable[[Any, str], Message] | None = None) -> Turns:
    """Messages from a list of them, a single one, or plain text said by `role_of_text`."""
    if isinstance(value, str):
        return ({"role": role_of_text, "content": sound_text(value, key)},)
    if not isinstance(value, list | dict):
        raise Unfit(f"{key} is neither text nor messages", type(value).__name__)
    return tuple((turn or _message)(m, key) for m in (value if isinstance(value, list) else [value]))


def _message(message: Any, key: str) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise Unfit(f"{key} has a message without a role", repr(message)[:60])
    if message["role"] not in ROLES:
        raise Unfit(f"{key} has a message with an unknown role", f"{message['role']!r}, known: {', '.join(ROLES)}")
    out = {name: value for name, value in message.items() if value is not None}
    content = out.get("content", "" if out.get("tool_calls") else None)
    if isinstance(content, list):            # [{"type": "text", "text": ...}]
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Unfit(f"{key} has content that is not text", repr(content)[:60])
        content = "".join(sound_text(part.get("text"), key) for part in content)
    out["content"] = sound_text(content, f"{key}'s content")
    if out.get("tool_calls"):
        out["tool_calls"] = [_tool_call(call, key) for call in _json(out["tool_calls"], f"{key}'s tool_calls", list)]
    return out


def _tool_call(call: Any, key: str) -> dict[str, Any]:
    """A tool call as chat templates take it: arguments as an object, not as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unfit(f"{key} has a tool call without a function name", repr(call)[:60])
    function = {**function, "arguments": _json(function.get("arguments", {}), f"{key}'s tool call arguments", dict)}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _json(value: Any, key: str, kind: type) -> Any:
    """A list or object, given as such or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Unfit(f"{key} is not JSON", error.msg) from None
    if not isinstance(value, kind):
        raise Unfit(f"{key} is not {'a list' if kind is list else 'an object'}", type(value).__name__)
    return value


def tools_of(fields: Fields) -> tuple[dict[str, Any], ...]:
    tools = _json(fields.get("tools") or [], "tools", list)
    if not all(isinstance(tool, dict) for tool in tools):
        raise Unfit("tools is not a list of objects")
    return tuple(tools)


def with_system(fields: Fields, prompt: Turns) -> Turns:
    system = sound_text(fields.get("system", ""), "system")
    if not system.strip():
        return prompt
    if prompt and prompt[0]["role"] == "system":
        raise Unfit("system is given twice", "as a field and as the first turn")
    return ({"role": "system", "content": system}, *prompt)


def sharegpt_turn(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise Unfit(f"{key} has a turn without 'from' and 'value'", repr(turn)[:60])
    if turn["from"] not in SHAREGPT_ROLES:
        raise Unfit(f"{key} has a turn from an unknown speaker",
                    f"{turn['from']!r}, known: {', '.join(SHAREGPT_ROLES)}")
    text = sound_text(turn["value"], f"{key}'s value")
    if turn["from"] != "function_call":
        return {"role": SHAREGPT_ROLES[turn["from"]], "content": text}
    calls = _json(text, f"{key}'s function_call", object)
    return _message({"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}, key)


def counts_of(fields: Fields, key: str, ids: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Which of the ids the loss counts, from a list of 0 and 1; None where the field is missing: all of them."""
    counts = fields.get(key)
    if counts is None:
        return None
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int, bool} or not set(counts) <= {0, 1}:
        raise Unfit(f"{key} is not a list of 0 and 1", repr(counts)[:40])
    if len(counts) != len(ids):
        raise Unfit(f"{key} has another length than its ids", f"{len(counts)}, not {len(ids)}")
    return tuple(map(bool, counts))


def ids_of(fields: Fields, key: str) -> tuple[int, ...]:
    ids = fields.get(key)
    if not isinstance(ids, list):
        raise Unfit(f"{key} is missing or not a list", f"fields: {', '.join(fields)}")
    if not set(map(type, ids)) <= {int}:     # exactly int: true and 1.0 are no token ids
        raise Unfit(f"{key} has an entry that is not a whole number",
                    repr(next(i for i in ids if type(i) is not int))[:40])
    if ids and not (min(ids) >= 0 and max(ids) < 2**31):
        raise Unfit(f"{key} has an id out of range", f"from {min(ids)} to {max(ids)}")
    return tuple(ids)
