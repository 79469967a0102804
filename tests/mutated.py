"""Inputs that nobody meant: rows of every data format, changed at random; files with their bytes changed; odd words."""
from __future__ import annotations

import copy
import gzip
import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

from dpo_dist.config.compose import choices, conf_dir, documented_keys
from dpo_dist.data.formats import FORMATS
from dpo_dist.data.formats.judgment import RECORDED, RESERVED

Row = dict[str, Any]
# what stands for text that json.dumps cannot write: thousands of brackets, thousands of digits
DEEP, HUGE = "@@deep@@", "@@huge@@"


def _said(role: str, text: str) -> Row:
    return {"role": role, "content": text}


_ASKED, _GOOD, _BAD = [_said("user", "Two and two?")], [_said("assistant", "Four.")], [_said("assistant", "Five.")]
_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}]}
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
    "a": {"type": "integer"}}}}}

# of each format some rows that it reads
ROWS: dict[str, list[Row]] = {
    "preference": [{"prompt": "Two?", "chosen": "Two.", "rejected": "One.", "weight": 2.0, "margin": 1, "system": "Be.",
                    "tags": ["sum"], "locale": "en", "chosen_rating": 4, "rejected_rating": "2", "group": "a"}],
    "messages": [{"prompt": _ASKED, "chosen": _GOOD, "rejected": _BAD, "tools": [_TOOL], "tie": False},
                 {"chosen": [*_ASKED, _CALL, _said("tool", "4"), *_GOOD], "rejected": [*_ASKED, *_BAD],
                  "chat_template_kwargs": {"thinking": True}}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Two?"}], "chosen": {"from": "gpt", "value": "Two."},
                  "rejected": {"from": "gpt", "value": "One."}}],
    "hh": [{"chosen": "\n\nHuman: Two?\n\nAssistant: Two.", "rejected": "\n\nHuman: Two?\n\nAssistant: One."}],
    "openai": [{"input": {"messages": _ASKED, "tools": [_TOOL]}, "preferred_output": _GOOD,
                "non_preferred_output": _BAD}],
    "swift": [{"messages": [*_ASKED, *_GOOD], "rejected_response": "Five."},
              {"query": "Two?", "response": "Two.", "rejected_response": "One.", "history": [["A?", "B."]]}],
    "alpaca": [{"instruction": "Add.", "input": "2 2", "chosen": "4", "rejected": "5", "history": [["A?", "B."]]}],
    "axolotl": [{"question": "Two?", "chosen_response": "Two.", "rejected_response": "One."}],
    "helpsteer": [{"context": _ASKED, "response1": "Four.", "response2": "Five.", "overall_preference": -2,
                   "individual_preference": [{"score": -1, "reasoning": "sum", "feedback1": "good"}], "domain": "math",
                   "response1_model": "a"}],
    "nemo_rl": [{"context": _ASKED, "completions": [{"rank": 0, "completion": _GOOD},
                                                    {"rank": 1, "completion": _BAD}]}],
    "distilabel": [{"instruction": "Two?", "generations": ["Two.", None, "One."], "ratings": [5, None, 2.5],
                    "generation_models": ["a", "b", "c"], "system_prompt": "Count."}],
    "ultrafeedback": [{"instruction": "Two?", "completions": [
        {"response": "Two.", "overall_score": 8.0, "model": "a", "annotations": {"honesty": {"Rating": "4"}}},
        {"response": "One.", "overall_score": 3, "annotations": {"honesty": [{"Rating": "N/A"}]}}]}],
    "argilla": [{"prompt": "Two?", "response_1": "Two.", "response_2": "One.", "preference.responses": ["response_1"],
                 "preference.responses.users": ["ann"], "preference.responses.status": ["submitted"],
                 "preference.suggestion": "response_1"},
                {"fields": {"prompt": "Two?", "response-1": "Two.", "response-2": "One."}, "responses": {"choice": [
                    {"user_id": "a", "value": {"value": ["1", "2"], "rank": [1, 2]}, "status": "submitted"}]}}],
    "kto": [{"prompt": "Two?", "completion": "Two.", "label": True, "confidence": 0.5, "model": "a"},
            {"prompt": "Two?", "completion": "One.", "label": False, "model": "b"}],
    "arena": [{"conversation_a": [*_ASKED, *_GOOD], "conversation_b": [*_ASKED, *_BAD], "winner": "model_a",
               "model_a": "a", "model_b": "b"},
              {"prompt": '["Two?"]', "response_a": '["Two."]', "response_b": '["One."]', "winner_model_a": 1,
               "winner_model_b": 0, "winner_tie": 0}],
    "ratings": [{"prompt": "Two?", "responses": ["Two.", "One.", "2"], "ratings": [3, 1, 3], "models": ["a", "b", "c"]},
                {"prompt": "Two?", "responses": [{"text": "Two.", "rating": 3}, {"text": "One.", "rating": 1}]}],
    "token_ids": [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1], "chosen_counts": [0, 1, 1]}],
}
assert ROWS.keys() == FORMATS.keys()

NAMES = sorted({*RESERVED, *RECORDED, *(name for rows in ROWS.values() for row in rows for name in row)})
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -2**70, 10**400, 0.0, -0.0, 1.5, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), "", " ", "\n", "null", "None", "nan", "inf", "1e999", "true", "0", "\ud83d",
    "a\ud800b", "\0", "\u2028", "é", "\U0001f600", "[", "{", "[]", "{}", '["a"]', '{"role": "user"}',
    "[{'role': 'user', 'content': 'x'}]",
    "[{'role': 'user' 'content': 'x'}]", '{"a": 1e999}', "[" * 200, "{'a':" * 200, "(" * 300, "9" * 6000,
    "-" * 3000 + "1", "x" * 5000, [], {}, [[]], [{}], [None], {"": ""}, {"a": None},
    [1, "a", None], {"role": "user"}, {"role": 3},
    {"role": ["user"], "content": 1}, {"from": [], "value": {}}, [{"role": "assistant", "content": None}],
    {"type": "text", "text": None}, {"name": "f", "arguments": "{"}, {"function": None}, [[1, 2], [3]], DEEP, HUGE,
    {"\ud83d": "\ud83d"}, {"user_id": [], "value": {}}, {"value": ["a"], "rank": [None]}, "both", "tie", "model_b",
    "\n\nHuman: A\n\nAssistant: B", "\n\nAssistant: ", "response_1", "A", "first"]


def junk(random: Random) -> Any:
    return copy.deepcopy(random.choice(JUNK))


def changed_value(value: Any, random: Random) -> Any:
    """The JSON value with some change anywhere in it."""
    inside = isinstance(value, dict | list) and value and random.random() < 0.8
    if not inside:
        return _replaced(value, random)
    if isinstance(value, list):
        at = random.randrange(len(value))
        ways: list[Callable[[], Any]] = [
            lambda: [*value[:at], changed_value(value[at], random), *value[at + 1:]],
            lambda: [*value[:at], *value[at + 1:]], lambda: [*value, junk(random)], lambda: [*value, value[at]],
            lambda: value[::-1]]
        return random.choice([*ways[:1] * 4, *ways[1:]])()
    key, other = random.choice(list(value)), random.choice([*value, *NAMES])
    ways = [lambda: {**value, key: changed_value(value[key], random)},
            lambda: {k: v for k, v in value.items() if k != key}, lambda: {**value, other: junk(random)},
            lambda: {**value, other: value[key]}, lambda: {other if k == key else k: v for k, v in value.items()},
            lambda: {**value, random.choice(["\ud83d", "", "a.b", "x" * 300, "\n"]): junk(random)}]
    return random.choice([*ways[:1] * 4, *ways[1:]])()


def _replaced(value: Any, random: Random) -> Any:
    ways: list[Callable[[], Any]] = [
        lambda: junk(random), lambda: junk(random), lambda: junk(random), lambda: [value], lambda: {"a": value},
        lambda: str(value), lambda: [value] * random.randint(0, 3)]
    try:
        return random.choice(ways)()
    except ValueError:                       # a number of too many digits for str()
        return None


def changed_row(row: Row, random: Random) -> Any:
    """The row with no change, one, or a few."""
    changed: Any = row
    for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3, 5])):
        changed = changed_value(changed, random)
    return changed


def json_text(value: Any) -> str:
    """The value as JSON, also what Python's own writer refuses."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except ValueError:
        return "9" * 5000
    return text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).replace(f'"{HUGE}"', "9" * 5000)


SUFFIXES = (".jsonl", ".jsonl", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")


def file_of(rows: list[Any], suffix: str) -> bytes:
    """The rows as a file of this kind; as JSON lines where it cannot hold them."""
    text = "".join(json_text(row) + "\n" for row in rows)
    if suffix == ".parquet":
        return _parquet(rows) or text.encode()
    if suffix.startswith(".csv"):
        text = _csv(rows)
    elif suffix.startswith(".json") and not suffix.startswith(".jsonl"):
        text = "[" + ",\n".join(map(json_text, rows)) + "]"
    data = text.encode("utf-8", "backslashreplace")
    return gzip.compress(data, 1) if suffix.endswith(".gz") else data


def _csv(rows: list[Any]) -> str:
    import csv

    rows = [row if isinstance(row, dict) else {"a": row} for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    try:
        writer.writeheader()
        writer.writerows({key: value if isinstance(value, str) else json_text(value) for key, value in row.items()}
                         for row in rows)
    except csv.Error:                        # no field at all
        return "a\n"
    return out.getvalue()


def _parquet(rows: list[Any]) -> bytes | None:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), out)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError):
        return None                          # of several kinds in one column, and the like
    return out.getvalue()


def changed_bytes(data: bytes, random: Random) -> bytes:
    """The bytes with some change: a bit, a piece gone, twice or at random, another beginning, the end missing."""
    at, size = (random.randrange(len(data) + 1) for _ in range(2))
    size = min(size, 40) if random.random() < 0.7 else size
    noise = random.randbytes(min(size, 200))
    flipped = bytearray(data)
    if data:
        flipped[at % len(data)] ^= 1 << random.randrange(8)
    return random.choice([
        bytes(flipped), bytes(flipped), data[:at], data[at:], data[:at] + noise + data[at:],
        data[:at] + data[at + size:], data[:at] + noise + data[at + len(noise):],
        data[:at] + data[at:at + size] * 3 + data[at:],
        b"\xef\xbb\xbf" + data, b"\xff\xfe" + data, b"", noise, b"\0" * min(len(data), 500), b"PAR1" + noise + b"PAR1",
        data.decode("utf-8", "replace").encode("utf-16")])


# ---------------------------------------------------------------------------------------------------------------- words

VALUES = ["", "null", "true", "false", "0", "1", "-1", "3", "1.5", "1e-6", "1e309", "-1e309", "nan", "inf", "-inf",
          "9" * 30, "9" * 400, "9" * 5000, "0x10", "1_000", "[]", "{}", "[1]", "[a,b]", "[[]]", "{a: b}",
          "{1: 2}", "{a: {b: c}}",
          "[{path: a}]", "1,2,3", "a,b", "choice(1,2)", "range(1,4)", "range(0,1,0)", "range(1,1e9)", "interval(0,1)",
          "glob(*)", "sort(3,1)", "sort(a,1)", "shuffle(1,2)", "int(a)", "str(1)", "float(1)", "int(1.5)", "bool(x)",
          "extend_list(a)", "'", '"', "'a'", '"b"', "'a", "\\", "a\\,b", "a b", "a\tb", "'a\nb'", "a\nb", "é", "\udce9",
          "\0", "\x1b[31m", "${a}", "${train.seed}", "${oc.env:HOME}", "'${'", "${", "\\${a}", "${${a}}", "${.seed}",
          "${..}", "${now:%Y}", "x" * 300, "x" * 5000, "/" * 40, "..", "~", "~/x", "/dev/null", "/etc/passwd", "http://",
          "a=b", "a:b", "???", "auto", "none", "cpu", "fp32", "bf16", "3.0", "1e3", "1e300", "[" * 60 + "]" * 60,
          "[" * 300, "{a: " * 50,
          "[1,[2,{a: [b]}]]", "[nan]", "{a: inf}", "[null]", "10000000000"]


def changed_words(random: Random) -> list[str]:
    """Some overrides, of known keys and others, most of them wrong."""
    words = [_word(random) for _ in range(random.choice([1, 1, 2, 3]))]
    return words if random.random() < 0.1 else ["model.path=m", *words]


def _word(random: Random) -> str:
    defaults = {key: default for key, default, _ in documented_keys()}
    keys = list(defaults)
    groups = [folder.name for folder in conf_dir().iterdir() if folder.is_dir()]
    group = random.choice(groups)
    as_it_is = random.choice(keys)
    word = random.choice([
        lambda: f"{as_it_is}={defaults[as_it_is]}", lambda: f"{random.choice(keys)}={random.choice(VALUES)}",
        lambda: f"{random.choice(keys)}={random.choice(VALUES)}",
        lambda: f"{random.choice(keys)}={random.choice(VALUES)}", lambda: f"{group}={random.choice(VALUES)}",
        lambda: f"{group}={random.choice([*choices(group), ''])}",
        lambda: f"{random.choice(['+', '++', '~', '/', '+hydra.', 'hydra.', ''])}{random.choice(keys)}"
                f"{random.choice(['', '=', '=1', '@a=1', '.0=1', '.a.b=c'])}",
        lambda: random.choice(VALUES)])()
    for _ in range(random.choice([0, 0, 0, 1, 3])):
        at = random.randrange(len(word) + 1)
        odd = random.choice("=.,[]{}'\"\\$~+@:/ \t\n\0é()")
        word = random.choice([word[:at] + odd + word[at:], word[:at] + word[at + 1:], word[:at],
                              word[at:] + word[:at]])
    return word
