"""Chats as files hold them → messages as chat templates take them: roles, tool calls, tools; or Unfit and why."""
from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from dpo_dist.data.fields import Fields, Turns, Unfit, from_json, reserved, sound_text
from dpo_dist.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "function_call": "assistant", "tool": "tool", "observation": "tool"}
NO_VALUE = ("", "null", "None")              # text that says that there is none
# text that begins as a list of turns does, or as a single turn
CHAT_TEXT = re.compile(r"\s*\[?\s*\{\s*([\"'])(role|content|from|value|name|tool_calls)\1\s*:")


def turns_of(value: Any, key: str, role_of_text: str, turn: Callable[[Any, str], Message] | None = None) -> Turns:
    """Messages from a list of them, a single one, or plain text said by `role_of_text`."""
    if isinstance(value, str):
        return ({"role": role_of_text, "content": sound_text(value, key)},)
    if not isinstance(value, list | dict):
        raise Unfit(f"{key} is neither text nor messages", type(value).__name__)
    return tuple((turn or turn_of)(m, key) for m in (value if isinstance(value, list) else [value]))


def message_of(message: Any, key: str) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise Unfit(f"{key} has a message without a role", repr(message)[:60])
    out = {name: value for name, value in message.items() if value is not None}
    if "function_call" in out:               # what OpenAI's messages had before tool_calls
        out["tool_calls"] = [from_json(out.pop("function_call"), f"{key}'s function_call", dict)]
    if out["role"] == "function":
        out["role"] = "tool"
    if out["role"] not in ROLES:
        raise Unfit(f"{key} has a message with an unknown role", f"{message['role']!r}, known: {', '.join(ROLES)}")
    if not out.get("tool_calls", True):      # an empty list is no call, but templates ask whether the key is there
        del out["tool_calls"]
    content = out.get("content", "" if "tool_calls" in out else None)
    if isinstance(content, list):            # [{"type": "text", "text": ...}]
        content = "".join(_text_of_part(part, key) for part in content)
    out["content"] = sound_text(content, f"{key}'s content")
    if "tool_calls" in out:
        out["tool_calls"] = [_tool_call(call, key)
                             for call in from_json(out["tool_calls"], f"{key}'s tool_calls", list)]
    return out


def _text_of_part(part: Any, key: str) -> str:
    if isinstance(part, str):
        return sound_text(part, key)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text"):
        raise Unfit(f"{key} has content that is not text", f"a part of type {kind!r}; only text is trained on")
    return sound_text(part.get("text"), key)


def _tool_call(call: Any, key: str) -> dict[str, Any]:
    """A tool call as chat templates take it: arguments as an object, not as JSON text."""
    call = from_json(call, f"{key}'s tool call", dict)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unfit(f"{key} has a tool call without a function name", repr(call)[:60])
    # what an API gives for a call without arguments is an empty text
    function = {**function, "arguments": from_json(function.get("arguments") or {}, f"{key}'s tool call arguments",
                                                   dict)}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def tools_of(fields: Fields) -> tuple[dict[str, Any], ...]:
    """The tool schemas: a list of objects or of their JSON texts, or JSON text as a whole."""
    tools = fields.get("tools")
    if not tools or (isinstance(tools, str) and tools.strip() in NO_VALUE):
        return ()
    try:
        found = [_tool(tool) for tool in from_json(tools, "tools", list)]
    except Unfit as unfit:
        raise Unfit("tools is not a list of objects", reserved("tools", unfit.reason)) from None
    return tuple(found)


def _tool(tool: Any) -> dict[str, Any]:
    """A tool schema, with its parameters as an object: a table holds those of different tools as JSON text."""
    tool = from_json(tool, "a tool", dict)
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("parameters"), str):
        return tool
    function = {**function, "parameters": from_json(function["parameters"], "a tool's parameters", dict)}
    return {**tool, "function": function} if "function" in tool else function


def with_system(fields: Fields, prompt: Turns, key: str = "system") -> Turns:
    """The prompt with the row's system text as its first turn, unless it says the same already."""
    system = system_of(fields, key)
    if not system.strip():
        return prompt
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() == system.strip():
            return prompt
        raise Unfit("system is given twice", "as a field and as the first turn")
    return ({"role": "system", "content": system}, *prompt)


def system_of(fields: Fields, key: str = "system") -> str:
    system = fields.get(key, "")
    if not isinstance(system, str):
        raise Unfit(f"{key} is not text", reserved(key, type(system).__name__))
    return sound_text(system, key)


def turn_of(turn: Any, key: str) -> Message:
    """An ordinary message, or ShareGPT's {from, value}."""
    if not isinstance(turn, dict) or "from" not in turn:
        return message_of(turn, key)
    if "value" not in turn:
        raise Unfit(f"{key} has a turn without 'value'", repr(turn)[:60])
    if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
        raise Unfit(f"{key} has a turn from an unknown speaker",
                    f"{turn['from']!r}, known: {', '.join(SHAREGPT_ROLES)}")
    text = sound_text(turn["value"], f"{key}'s value")
    if turn["from"] != "function_call":
        return {"role": SHAREGPT_ROLES[turn["from"]], "content": text}
    return called(text, key)


def called(text: str, key: str) -> Message:
    """The assistant's turn of a tool call that is written as JSON text, one or a list of them."""
    calls = from_json(text, f"{key}'s function_call", object)
    return message_of({"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}, key)


def chat_in_text(text: str, key: str) -> Any:
    """The chat that a cell holds as JSON, or as the Python text that tables are written with; other text as it is.

    Text that begins and ends like a chat and is neither (numpy's way to print one has no commas) is Unfit: as plain
    text, braces and quotes would be trained on.
    """
    if not CHAT_TEXT.match(text):
        return text
    value = value_in_text(text)
    if value is not None:
        turns = value if isinstance(value, list) else [value]
        return value if all(_is_turn(turn) for turn in turns) else text
    if text.rstrip().endswith("]"):
        raise Unfit(f"{key} looks like a chat, but is neither JSON nor Python", repr(text[:60]))
    return text


def value_in_text(text: str) -> Any:
    """What a text holds as JSON, or as the Python text that tables are written with; None where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    if "from" in turn:
        return "value" in turn and isinstance(turn["from"], str) and turn["from"] in SHAREGPT_ROLES
    return turn.get("role") in (*ROLES, "function") and not turn.keys().isdisjoint(
        ("content", "tool_calls", "function_call"))
