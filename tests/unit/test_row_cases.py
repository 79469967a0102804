"""Rows as people have them: each is read as what it plainly is, or refused with a reason, and never ends in a crash."""
from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import pytest
from row_files import PLAIN, assistant, calls, read, reasons, user, write_lines

from dpo_dist.config.errors import UserError
from dpo_dist.data.columns import Columns
from dpo_dist.data.fields import Unfit
from dpo_dist.data.formats import FORMATS
from dpo_dist.data.padding import Padding
from dpo_dist.data.records import Record
from dpo_dist.data.rows import ReadReport, rows_of


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "s"}
CHATS = {"chosen": [user("q"), assistant("x")], "rejected": [user("q"), assistant("y")]}
ANSWERS = {"chosen": "x", "rejected": "y"}
NAN = float("nan")
PARTS = [{"type": "text", "text": "q", "image_url": None}]
DEEP = [{"role": "system", "content": ""}, user("q")]


def text_of(part: Any) -> str:
    """Texts as they are; of messages, who says what."""
    return part if isinstance(part, str) else " ".join(f"{m['role'][0]}:{m['content']}" for m in part)


@pytest.mark.parametrize("row, format, prompt", [
    # own columns that mean something elsewhere
    ({"prompt": "q", **ANSWERS, "messages": [user("z")]}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "tools": "", "system": None, "images": []}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "tools": "[]", "system": "", "chat_template_kwargs": None}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "tools": "null", "image": ""}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "rank": 1, "label": "good", "score": [1], "id": {"a": 1}}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "completions": ["a"], "responses": {"a": 1}, "ratings": "high"}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "completion": "x", "label": True}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "context": [user("z")], "input": "z", "instruction": "z"}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "fields": {"a": 1}, "meta": {"user_id": 1, "value": None}}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "notes": [{"user_id": "u", "value": "nice", "status": None}]}, "preference", "q"),
    ({"prompt": "q", **ANSWERS, "chosen_rating": "high", "chosen_model": 7, "score_rejected": None}, "preference", "q"),
    ({**CHATS, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "z"}]}, "messages", "u:q"),
    ({**CHATS, "prompt": None, "question": "q", "source": "a"}, "messages", "u:q"),
    ({**CHATS, "prompt": " q\n", "label": 1, "response": "x"}, "messages", "u:q"),
    ({**CHATS, "generations": ["x", "y"], "rating": [9.0, 1.0], "input": "q", "order": ["a"]}, "messages", "u:q"),
    # mixtures of texts, turns and chats
    ({"prompt": [user("q")], **ANSWERS}, "messages", "u:q"),
    ({"prompt": user("q"), "chosen": assistant("x"), "rejected": "y"}, "messages", "u:q"),
    ({"prompt": "q", "chosen": [assistant("x")], "rejected": [assistant("y")]}, "messages", "u:q"),
    ({"prompt": [user(PARTS)], **ANSWERS}, "messages", "u:q"),
    ({"prompt": [user("q")], "system": "s", **ANSWERS}, "messages", "s:s u:q"),
    ({"prompt": [SYSTEM, user("q")], "system": " s ", **ANSWERS}, "messages", "s:s u:q"),
    ({"messages": [user("q")], "chosen": assistant("x"), "rejected": assistant("y")}, "messages", "u:q"),
    ({"messages": [SYSTEM, user("q")], **ANSWERS}, "messages", "s:s u:q"),
    ({"chosen": [*DEEP, assistant("x")], "rejected": [*DEEP, assistant("y")], "prompt": "q"}, "messages", "s: u:q"),
    ({"chosen": [human("q"), gpt("x")], "rejected": [human("q"), gpt("y")]}, "messages", "u:q"),
    ({"prompt": [human("q")], "chosen": gpt("x"), "rejected": "y"}, "messages", "u:q"),
    # what pandas has for null
    ({"prompt": "q", **ANSWERS, "system": NAN, "tools": NAN, "images": NAN, "tags": NAN}, "preference", "q"),
    ({"instruction": "q", "input": NAN, **ANSWERS, "history": NAN, "chosen_rating": NAN}, "alpaca", "q"),
    # other trainers'
    ({"conversations": [user("q")], "chosen": assistant("x"), "rejected": assistant("y"), "tools": "[]"}, "sharegpt",
     "u:q"),
    ({"conversations": [{"from": "human", "value": "q"}], **ANSWERS, "tools": ""}, "sharegpt", "u:q"),
    ({"conversations": [human("q")], "chosen": gpt("x"), "rejected": gpt("y"), "system": "s"}, "sharegpt", "s:s u:q"),
    ({"system": "s", "question": "q", "chosen": [assistant("x")], "rejected": [assistant("y")]}, "axolotl", "s:s u:q"),
    ({"system": "s", "question": "q", **ANSWERS}, "axolotl", "s:s u:q"),
    ({"system": "", "input": "q", **ANSWERS, "generations": ["x", "y"], "rating": [9, 1]}, "axolotl", "q"),
    ({"instruction": "Sum up.", "input": '[{"a": 1}]', **ANSWERS}, "alpaca", 'Sum up.\n[{"a": 1}]'),
    ({"context": [user("q")], "response1": "x", "response2": "y", "overall_preference": 1, **CHATS}, "messages", "u:q"),
    ({"context": "q", "response1": "y", "response2": "x", "overall_preference": 3, "score": "3"}, "helpsteer", "q"),
    ({"messages": [user("q")], "generations": ["x", "y"], "ratings": [2, 1]}, "distilabel", "u:q"),
    ({"prompt": "q", "responses": [{"content": "y", "score": 1, "model": None}, {"content": "x", "score": "2"}]},
     "ratings", "q"),
])
def test_rows_are_read_as_what_they_plainly_are(tmp_path, row, format, prompt):
    (found,), report = read(write_lines(tmp_path / "rows.jsonl", row))
    texts = [text_of(part) for part in (found.prompt, found.chosen, found.rejected)]
    assert [report.format, *texts] in ([format, prompt, "x", "y"], [format, prompt, "a:x", "a:y"])


@pytest.mark.parametrize("row, reason", [
    ({"messages": [user("q"), assistant("x")], "rejected_response": "y", "images": ["a.png"]},
     "the row has images, and only text is trained on"),
    ({**PLAIN, "image": {"bytes": "aGk=", "path": None}}, "the row has image, and only text is trained on"),
    ({"prompt": [user([{"type": "image_url", "image_url": {"url": "a.png"}}])], **ANSWERS},
     "prompt has content that is not text"),
    ({"prompt": [user("q")], "system": "t", "chosen": [SYSTEM, user("q"), assistant("x")], "rejected": "y"},
     "chosen and rejected part at a system turn, not at an answer"),
    ({"prompt": [SYSTEM, user("q")], "system": "t", **ANSWERS}, "system is given twice"),
    ({"system": "s", "chosen": [assistant("x")], "rejected": [assistant("y")]}, "prompt is missing"),
    ({"prompt": "z", **CHATS}, "chosen and rejected begin with turns other than prompt"),
    ({"instruction": "q", "input": ["a"], **ANSWERS}, "input is not text"),
    ({**PLAIN, "chosen": ["x"]}, "chosen has a message without a role"),
    ({**PLAIN, "tools": ["search"]}, "tools is not a list of objects"),
    ({"prompt": [user("q")], "chosen": [calls("f", [1])], "rejected": "y"},
     "chosen's tool call arguments is not an object"),
])
def test_rows_that_cannot_be_meant_say_why(tmp_path, row, reason):
    assert reasons(tmp_path, "auto", row) == {reason: 1}


def test_texts_and_chats_may_stand_in_one_file(tmp_path):
    rows, report = read(write_lines(tmp_path / "rows.jsonl", PLAIN, CHATS, {"prompt": [user("q")], **ANSWERS}))
    assert report.format == "preference" and [text_of(row.prompt) for row in rows] == [PLAIN["prompt"], "u:q", "u:q"]


@pytest.mark.parametrize("tools", ['[{"name": "f"}]', ['{"name": "f"}'], [{"name": "f"}], '["{\\"name\\": \\"f\\"}"]',
                                   "[{'name': 'f'}]"])
def test_tools_may_be_objects_text_or_a_list_of_json_texts(tmp_path, tools):
    (row,), _ = read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "tools": tools}))
    assert row.tools == ({"name": "f"},)


def test_parameters_of_a_tool_may_be_json_text(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": '{"properties": {"a": {"default": null}}}'}}
    (row,), _ = read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "tools": [tool]}))
    assert row.tools[0]["function"]["parameters"] == {"properties": {"a": {"default": None}}}


def test_a_number_may_be_a_decimal_as_tables_have_them(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{**PLAIN, "weight": Decimal("2.5")}]), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet")[0][0].weight == 2.5


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000 + "]" * 100_000])
def test_a_line_that_python_cannot_read_is_a_broken_line(tmp_path, value):
    line = json.dumps(PLAIN)[:-1] + f', "own": {value}}}'
    assert reasons(tmp_path, "auto", line, PLAIN) == {"broken JSON line": 1}
    (tmp_path / "list.json").write_text(f"[{line}]")
    with pytest.raises(UserError, match=r"list\.json:1: broken JSON after row 0"):
        read(tmp_path / "list.json")


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, {"enable_thinking": False, "n": None},
                                    '{"enable_thinking": false}'])
def test_a_row_may_have_variables_of_its_own_for_the_template(tmp_path, kwargs):
    (row,), _ = read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "chat_template_kwargs": kwargs}))
    assert row.template_kwargs == {"enable_thinking": False}


# ------------------------------------------------------------------------------------------------------------- anything

SOUND = [
    {**PLAIN, "system": "s", "weight": 1, "margin": 2, "tags": ["a"]}, CHATS, {"prompt": [user("q")], **ANSWERS},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "x"}, "rejected": "y"},
    {"input": {"messages": [user("q")], "tools": []}, "preferred_output": [assistant("x")],
     "non_preferred_output": [assistant("y")]},
    {"messages": [user("q"), assistant("x")], "rejected_messages": [user("q"), assistant("y")], "label": True},
    {"instruction": "q", "input": "i", "history": [["a", "b"]], **ANSWERS},
    {"context": [user("q")], "completions": [{"rank": 0, "completion": [assistant("x")]},
                                             {"rank": 1, "completion": [assistant("y")]}]},
    {"instruction": "q", "generations": ["x", "y"], "ratings": [1, 2], "generation_models": ["m", "n"]},
    {"instruction": "q", "completions": [{"response": "x", "overall_score": 1, "annotations": {"a": {"Rating": "1"}}},
                                         {"response": "y", "overall_score": 2}]},
    {"context": "q", "response1": "x", "response2": "y", "overall_preference": 1,
     "individual_preference": [{"score": 1, "reasoning": "r"}]},
    {"prompt": "q", "response_1": "x", "response_2": "y", "better.responses": ["response_1", "tie"],
     "better.responses.users": ["u", "v"], "better.suggestion": "response_2"},
    {"prompt": "q", "response_1": "x", "response_2": "y",
     "better": [{"user_id": "u", "value": [{"rank": 1, "value": "response_1"}], "status": "submitted"}]},
    {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"default": None}, "b": None}}}}],
     "prompt": [user("q")], "chosen": [calls("f", {"a": None, "b": [None]})], "rejected": [assistant("y")]},
]
ODD: list[Any] = [None, 0, 1.5, True, "", "x", "[", "[{'role': 'user', 'content': 'x'}]", [], [None], ["a"], [[]], [{}],
                  {}, {"a": None}, {"role": "user"}, [{"role": ["x"], "content": "x"}], [{"from": ["x"], "value": 1}],
                  {"user_id": [1], "value": [None]}, float("nan"), [1, 2], [{"rank": None, "completion": 7}], [["a"]]]


def with_something_odd(value: Any, r: random.Random) -> Any:
    if isinstance(value, dict) and value and r.random() < 0.9:
        key = r.choice(list(value))
        return {**value, key: with_something_odd(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.8:
        at = r.randrange(len(value))
        return [*value[:at], with_something_odd(value[at], r), *value[at + 1:]]
    return r.choice(ODD)


def test_no_row_whatever_is_in_it_ends_in_anything_but_pairs_or_a_reason():
    outcomes = 0
    for seed in range(3000):
        r = random.Random(seed)
        own = r.choice(["weight", "tags", "label", "system", "tools", "images"])
        row = with_something_odd({**r.choice([{}, *SOUND]), own: r.choice(ODD), **r.choice(SOUND)}, r)
        cleaned = Padding(lambda row=row: [row]).without(row)
        try:
            fields = Columns(None).fields_of(cleaned)
        except Unfit:
            continue
        for name, form in FORMATS.items():
            report = ReadReport("", name)
            form.fits(fields)
            entries = form.group([Record("", fields)] * 2) if form.group else [Record("", fields)]
            outcomes += sum(1 for entry in entries for _ in rows_of(entry, form, report))
            outcomes += sum(report.bad.counts.values())
    assert outcomes > 10_000
