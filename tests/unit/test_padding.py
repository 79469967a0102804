"""Nulls: those that a table's schema added never reach a template; those that were meant stay where a file can tell."""
from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from row_files import assistant, calls, read, user, write_lines

from dpo_dist.data.padding import Evidence


def tool(name: str, required: list[str] | None = None, **properties: object) -> dict:
    parameters = {"type": "object", "properties": properties, "required": required or []}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def row(tools: list[dict], chosen: dict, **more: object) -> dict:
    return {"tools": tools, "prompt": [user("q")], "chosen": [chosen], "rejected": [assistant("no")], **more}


def arguments(turn: dict) -> dict:
    return turn["tool_calls"][0]["function"]["arguments"]


TEXT, MAYBE_TEXT = {"type": "string"}, {"type": ["string", "null"]}
WEATHER, CLOCK = tool("weather", town=TEXT), tool("clock", zone=TEXT, style={"type": "string", "enum": ["a", "b"]})
ROWS = [row([WEATHER], calls("weather", {"town": "Paris"})), row([CLOCK], calls("clock", {"zone": "utc"})),
        {"tools": [], "prompt": [user("q")], "chosen": [assistant("a")], "rejected": [calls("clock", {"zone": "cet"})]}]


def parts(path: Path) -> list:
    return [replace(found, where="", source="") for found in read(path)[0]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_rows_that_went_through_a_table_are_those_that_were_written(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    expected = parts(write_lines(tmp_path / "rows.jsonl", *ROWS))
    table, path = datasets.Dataset.from_list(ROWS), tmp_path / f"table.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        table.to_json(path)                  # one object a line, nulls and all
    else:
        path.write_text(json.dumps(table.to_list()))
    if kind != "parquet":
        assert "null" in path.read_text()
    assert parts(path) == expected


@pytest.mark.parametrize("as_text", [json.dumps, repr])
def test_a_tables_nulls_are_taken_out_of_the_chats_and_tools_in_a_csvs_cells(tmp_path, as_text):
    datasets = pytest.importorskip("datasets")
    expected = parts(write_lines(tmp_path / "rows.jsonl", *ROWS))
    both = row([WEATHER, CLOCK], calls("clock", {"zone": "utc", "style": "a"}))      # its arguments have no null
    for name, rows in (("padded", datasets.Dataset.from_list([*ROWS, both]).to_list()), ("written", [*ROWS, both])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows({key: as_text(value) for key, value in row.items()} for row in rows)
    padded, written = parts(tmp_path / "padded.csv"), parts(tmp_path / "written.csv")
    assert "zone" in (tmp_path / "padded.csv").read_text().splitlines()[1]
    assert padded == written and padded[:3] == expected


def test_a_null_that_a_call_in_a_cell_really_passed_stays(tmp_path):
    found = row([tool("weather", town=MAYBE_TEXT)], calls("weather", {"town": None}))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, found)
        writer.writeheader()
        writer.writerow({key: json.dumps(value) for key, value in found.items()})
    assert arguments(parts(tmp_path / "rows.csv")[0].chosen[0]) == {"town": None}


def test_padded_calls_and_schemas_of_a_table_read_as_calls_in_json_text_do(tmp_path):
    """The two files of the public cases: one written by hand, one from a table."""
    padded = [row([tool("weather", town=TEXT, zone=None)], calls("weather", {"town": "Berlin", "zone": None})),
              row([tool("clock", town=None, zone=TEXT)], calls("clock", {"town": None, "zone": "utc"}))]
    text = [row([tool("weather", town=TEXT)], calls("weather", '{"town": "Berlin"}')),
            row([tool("clock", zone=TEXT)], calls("clock", '{"zone": "utc"}'))]
    assert (parts(write_lines(tmp_path / "padded.jsonl", *padded))
            == parts(write_lines(tmp_path / "text.jsonl", *text)))


def test_a_null_in_arguments_that_are_json_text_is_always_meant(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [row([WEATHER], calls("weather", '{"town": null, "other": null}')), row([CLOCK], calls("clock", "{}"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "rows.parquet", write_lines(tmp_path / "rows.jsonl", *rows)):
        assert [arguments(found.chosen[0]) for found in read(path)[0]] == [{"town": None, "other": None}, {}]


def test_a_null_in_a_file_that_no_table_wrote_is_meant(tmp_path):
    weather = tool("weather", town=TEXT, unit=MAYBE_TEXT)
    path = write_lines(tmp_path / "rows.jsonl",
                       row([weather], calls("weather", {"town": "Paris", "unit": None})),
                       row([weather], calls("weather", {"town": "Rome"})),           # no table leaves `unit` out
                       row([weather], calls("weather", {"town": "Oslo", "unit": "C"})))
    assert [arguments(found.chosen[0]) for found in read(path)[0]] == [
        {"town": "Paris", "unit": None}, {"town": "Rome"}, {"town": "Oslo", "unit": "C"}]


def test_a_null_is_meant_where_nothing_else_ever_stands(tmp_path):
    weather = tool("weather", town=TEXT, unit=MAYBE_TEXT)
    path = write_lines(tmp_path / "rows.jsonl", row([weather], calls("weather", {"town": "Paris", "unit": None})))
    assert arguments(read(path)[0][0].chosen[0]) == {"town": "Paris", "unit": None}


def test_a_required_null_is_meant_even_where_a_table_may_have_written_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    strict = tool("weather", ["town", "unit"], town=TEXT, unit={"anyOf": [TEXT, {"type": "null"}]})
    rows = [row([strict], calls("weather", {"town": "Paris", "unit": None})),
            row([strict], calls("weather", {"town": "Rome", "unit": "C"}))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "rows.parquet", write_lines(tmp_path / "rows.jsonl", *rows)):
        assert arguments(read(path)[0][0].chosen[0]) == {"town": "Paris", "unit": None}


def test_a_null_for_what_another_tool_takes_is_padding(tmp_path):
    both = [WEATHER, tool("clock", zone=MAYBE_TEXT)]
    paris = calls("weather", {"town": "Paris", "zone": None})
    for others in ([], [row(both, calls("clock", {"town": None, "zone": "utc"}))], [row(both, calls("clock", {}))]):
        path = write_lines(tmp_path / "rows.jsonl", row(both, paris), *others)
        assert arguments(read(path)[0][0].chosen[0]) == {"town": "Paris"}
    path = write_lines(tmp_path / "rows.jsonl", row([WEATHER], paris), row([CLOCK], calls("clock", {"zone": "utc"})))
    assert arguments(read(path)[0][0].chosen[0]) == {"town": "Paris"}


def test_a_null_for_what_no_tool_takes_is_meant_if_nothing_else_ever_stands_there(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", row([WEATHER], calls("weather", {"town": "Paris", "made_up": None})))
    assert arguments(read(path)[0][0].chosen[0]) == {"town": "Paris", "made_up": None}


def test_nulls_in_lists_are_never_padding(tmp_path):
    datasets = pytest.importorskip("datasets")
    either = tool("weather", unit={"type": "string", "enum": ["C", None]})
    rows = [row([either], calls("weather", {"unit": "C", "days": [1, None]})), row([either], calls("weather", {}))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "rows.parquet", write_lines(tmp_path / "rows.jsonl", *rows)):
        found = read(path)[0]
        assert found[0].tools == (either,)
        assert arguments(found[0].chosen[0]) == {"unit": "C", "days": [1, None]}
        assert arguments(found[1].chosen[0]) == {}


def test_a_default_of_null_stays_and_a_parameter_of_null_goes(tmp_path):
    unit = {"type": ["string", "null"], "default": None, "description": None}
    path = write_lines(tmp_path / "rows.jsonl",
                       row([tool("weather", town=TEXT, unit=unit, zone=None)], calls("weather", {"town": "Paris"})))
    assert read(path)[0][0].tools == (
        tool("weather", town=TEXT, unit={"type": ["string", "null"], "default": None}),)


def test_a_default_that_a_table_added_goes(tmp_path):
    with_default, without = {"type": "string", "default": "C"}, {"type": "string", "default": None}
    path = write_lines(tmp_path / "rows.jsonl", row([tool("f", unit=with_default)], calls("f", {})),
                       row([tool("g", unit=without)], calls("g", {})))
    assert read(path)[0][1].tools == (tool("g", unit={"type": "string"}),)


def test_nulls_of_messages_never_matter(tmp_path):
    turn = {"name": None, "tool_calls": None, "tool_call_id": None, "reasoning_content": None}
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": [user("q") | turn], "chosen": [assistant("a") | turn],
                                                 "rejected": [assistant("b") | turn | {"tool_calls": []}]})
    (found,), _ = read(path)
    assert (found.prompt, found.chosen, found.rejected) == ((user("q"),), (assistant("a"),), (assistant("b"),))


@pytest.mark.parametrize("records, a_table", [
    ([{"a": 1, "meta": {"x": 1}}, {"b": 1, "meta": {"y": 1}}], True),
    ([{"prompt": [user("q"), assistant("a")]}], True),
    ([{"prompt": [user("q"), calls("f", {})]}], False),
    ([{"tools": [tool("f", a=TEXT), tool("g", b=TEXT)]}], False),
])
def test_whether_a_table_wrote_a_file_is_told_from_its_messages_and_tools(records, a_table):
    assert Evidence(lambda: records).a_table == a_table
