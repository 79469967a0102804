"""Readers: what each format gives, and what is said of rows that do not fit."""
from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data import files
from dpo_dist.data.files import read_records
from dpo_dist.data.formats import FORMATS, DataRow
from dpo_dist.data.rows import ReadReport, read_rows
from dpo_dist.types import PreferenceRow, TokenizedPair

SHARED = Path(os.environ.get("DPO_DIST_SHARED", Path(__file__).parents[3] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here; set DPO_DIST_SHARED")

PLAIN = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}


def user(text: object) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def calls(name: str, arguments: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, format: str = "auto", on_bad_row: str = "error", **more: str) -> tuple[list[DataRow], ReadReport]:
    rows, report = read_rows(DatasetConfig(str(path), format, **more), on_bad_row)
    return list(rows), report


def read_one(tmp_path: Path, row: dict, format: str = "auto") -> PreferenceRow:
    (only,), _ = read(write_lines(tmp_path / "rows.jsonl", row), format)
    assert isinstance(only, PreferenceRow)
    return only


def reasons(tmp_path: Path, format: str, *rows: object) -> dict[str, int]:
    return read(write_lines(tmp_path / "bad.jsonl", *rows), format, "skip")[1].bad.counts


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [PLAIN, {"prompt": "What, \"so\"?\nYes", "chosen": "NA", "rejected": "007"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    write_lines(tmp_path / "lines.json", *rows)
    write_lines(tmp_path / "lines.jsonl", *rows)
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as stream:
        stream.write("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "table.csv", index=False)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    for name in ("list.json", "lines.json", "lines.jsonl", "lines.jsonl.gz", "table.csv", "table.parquet"):
        found, report = read(tmp_path / name)
        assert [(r.prompt, r.chosen, r.rejected) for r in found] == [tuple(r.values()) for r in rows], name
        assert (report.rows, report.pairs, report.format) == (2, 2, "preference")


def test_a_row_says_where_it_stands(tmp_path):
    rows, _ = read(write_lines(tmp_path / "a.jsonl", PLAIN, "", PLAIN))
    assert [r.where.removeprefix(str(tmp_path)) for r in rows] == ["/a.jsonl:1", "/a.jsonl:3"]
    (tmp_path / "b.json").write_text(json.dumps([PLAIN, PLAIN]))
    assert ([r.where.removeprefix(str(tmp_path)) for r in read(tmp_path / "b.json")[0]]
            == ["/b.json:row 1", "/b.json:row 2"])
    (tmp_path / "c.csv").write_text('prompt,chosen,rejected,weight\n"two\nlines",a,b,\nc,d,e,2\n')
    csv_rows, _ = read(tmp_path / "c.csv")
    assert [r.where.removeprefix(str(tmp_path)) for r in csv_rows] == ["/c.csv:2", "/c.csv:4"]
    assert [r.weight for r in csv_rows] == [1.0, 2.0]


def test_a_big_json_list_is_read_through_a_small_window(tmp_path, monkeypatch):
    rows = [{**PLAIN, "chosen": "x" * n + "]},{\"é"} for n in range(1, 200, 7)]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8-sig")
    monkeypatch.setattr(files, "CHUNK_CHARS", 16)
    assert [r.value for r in read_records(DatasetConfig(str(tmp_path / "list.json")))] == rows


def test_a_broken_json_list_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "list.json").write_text('[\n{"a": 1},\n{"a": 2}\n{"a": 3}\n]')
    with pytest.raises(UserError, match=r"list.json:4: broken JSON after row 1: ',' or '\]' expected"):
        list(read_records(DatasetConfig(str(tmp_path / "list.json"))))
    (tmp_path / "cut.json").write_text('[\n{"a": 1},\n{"a": ')
    with pytest.raises(UserError, match=r"cut.json:3: broken JSON after row 1"):
        list(read_records(DatasetConfig(str(tmp_path / "cut.json"))))


def test_a_truncated_gzip_file_is_a_user_error(tmp_path):
    whole = gzip.compress("\n".join(json.dumps({**PLAIN, "chosen": str(i) * 50}) for i in range(200)).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match=r"rows.jsonl.gz cannot be read"):
        read(tmp_path / "rows.jsonl.gz")


def test_a_folder_is_read_in_the_order_of_its_files_names(tmp_path):
    for name in "bca":
        write_lines(tmp_path / f"{name}.jsonl", {**PLAIN, "prompt": name})
    (tmp_path / "README.md").write_text("no rows")
    assert [r.prompt for r in read(tmp_path)[0]] == ["a", "b", "c"]


def test_test_files_of_a_folder_are_never_read_as_train_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train-00000.jsonl", {**PLAIN, "prompt": "train"})
    write_lines(tmp_path / "data" / "test-00000.jsonl", {**PLAIN, "prompt": "test"})
    assert [r.prompt for r in read(tmp_path)[0]] == ["train"]
    assert [r.prompt for r in read(tmp_path, split="test")[0]] == ["test"]
    with pytest.raises(UserError, match="test, train"):
        read(tmp_path, split="validation")


def test_a_split_that_would_do_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="split='test' would do nothing"):
        read(write_lines(tmp_path / "rows.jsonl", PLAIN), split="test")


def test_a_missing_path_is_an_error_that_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nothing.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/no-such-set' .* cannot be loaded as a hub data set: the network is "
                                        r"off"):
        read(Path("nobody/no-such-set"))


def test_a_data_set_without_rows_is_an_error(tmp_path):
    for name, content in (("a.jsonl", ""), ("b.json", "[]"), ("c.csv", "prompt,chosen,rejected\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="has no rows"):
            read(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- bad rows


def test_a_bad_row_is_an_error_that_names_file_line_count_and_remedy(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PLAIN, '{"prompt": "a", ', PLAIN, {"prompt": "b", "chosen": "c"})
    with pytest.raises(UserError) as error:
        read(path, "preference")
    message = str(error.value)
    assert message.startswith(f"2 bad row(s) of 4 in '{path}'")
    assert f"{path}:2: broken JSON line (" in message and f"{path}:4: rejected is missing" in message
    assert "data.on_bad_row=skip" in message


def test_skipped_rows_are_counted_by_reason(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PLAIN, "{", {**PLAIN, "chosen": " "}, "[1]", {**PLAIN, "chosen": ""},
                       PLAIN)
    rows, report = read(path, "preference", "skip")
    assert len(rows) == report.pairs == 2 and report.rows == 6
    assert report.bad.counts == {"broken JSON line": 1, "chosen is empty": 2, "the row is not an object with fields": 1}
    assert report.bad.examples["chosen is empty"] == [f"{path}:3: chosen is empty", f"{path}:5: chosen is empty"]


@pytest.mark.parametrize("change, reason", [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": 7}, "prompt is not text"),
    ({"rejected": None}, "rejected is missing"),
    ({"rejected": "Four."}, "chosen and rejected are identical"),
    ({"chosen": "half a pair \ud83d"}, "chosen is not valid Unicode"),
    ({"weight": 0}, "weight is not greater than 0"),
    ({"weight": "heavy"}, "weight is not a number"),
    ({"weight": True}, "weight is not a number"),
    ({"strength": float("nan")}, "strength is not a number"),
    ({"strength": 1, "margin": 1}, "strength and margin are both given"),
])
def test_a_preference_row_that_does_not_fit_says_why(tmp_path, change, reason):
    assert reasons(tmp_path, "preference", {**PLAIN, **change}) == {reason: 1}


@pytest.mark.parametrize("change, reason", [
    ({"chosen_ids": []}, "chosen is empty"),
    ({"prompt_ids": []}, "prompt is empty"),
    ({"rejected_ids": [4, 5]}, "chosen and rejected are identical"),
    ({"chosen_ids": [4, -1]}, "chosen_ids has an id out of range"),
    ({"chosen_ids": [4, 2**31]}, "chosen_ids has an id out of range"),
    ({"chosen_ids": [4, 1.0]}, "chosen_ids has an entry that is not a whole number"),
    ({"chosen_ids": [4, True]}, "chosen_ids has an entry that is not a whole number"),
    ({"chosen_ids": "4 5"}, "chosen_ids is missing or not a list"),
])
def test_a_token_ids_row_that_does_not_fit_says_why(tmp_path, change, reason):
    assert reasons(tmp_path, "token_ids", {"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [6],
                                           **change}) == {reason: 1}


@pytest.mark.parametrize("row, reason", [
    ({"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"}, "the prompt ends with an assistant turn"),
    ({"prompt": [{"role": "human", "content": "a"}], "chosen": "c", "rejected": "d"},
     "prompt has a message with an unknown role"),
    ({"prompt": [{"content": "a"}], "chosen": "c", "rejected": "d"}, "prompt has a message without a role"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
     "chosen and rejected part at a user turn, not at an answer"),
    ({"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")]},
     "chosen and rejected begin with turns other than prompt"),
    ({"chosen": [user("a"), assistant("b"), user("c")], "rejected": [user("a"), assistant("d")]},
     "chosen does not begin and end with an assistant turn"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "rejected is empty"),
    ({"prompt": "a", "chosen": [assistant("b"), user("c"), assistant(" ")], "rejected": "d"}, "chosen is empty"),
    ({"prompt": [user([{"type": "image"}])], "chosen": "c", "rejected": "d"}, "prompt has content that is not text"),
    ({"prompt": "a", "chosen": calls("f", "{"), "rejected": "d"}, "chosen's tool call arguments is not JSON"),
])
def test_a_messages_row_that_does_not_fit_says_why(tmp_path, row, reason):
    assert reasons(tmp_path, "messages", row) == {reason: 1}


# -------------------------------------------------------------------------------------------------------------- formats


def test_preference_rows_carry_what_is_known_of_the_judgment(tmp_path):
    row = read_one(tmp_path, {**PLAIN, "weight": 2, "margin": 0.5, "tags": {"level": 3}})
    assert (row.prompt, row.weight, row.strength, row.record) == (PLAIN["prompt"], 2.0, 0.5, {"tags": {"level": 3}})


def test_a_system_text_turns_a_preference_row_into_messages(tmp_path):
    row = read_one(tmp_path, {**PLAIN, "system": "Be brief."})
    assert row.prompt == ({"role": "system", "content": "Be brief."},
                          user("Two and two?")) and row.chosen == (assistant("Four."),)


def test_the_source_is_the_given_name_or_the_path(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PLAIN)
    assert read(path)[0][0].source == str(path) and read(path, name="sums")[0][0].source == "sums"


def test_messages_with_an_explicit_prompt_take_lists_single_messages_and_text(tmp_path):
    for prompt in ("hi", user("hi"), [user("hi")]):
        for chosen in ("yes", assistant("yes"), [assistant("yes")]):
            row = read_one(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": [assistant("no")]}, "messages")
            assert (row.prompt, row.chosen, row.rejected) == ((user("hi"),), (assistant("yes"),), (assistant("no"),))


def test_messages_without_a_prompt_share_it(tmp_path):
    shared = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    row = read_one(tmp_path, {"chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e")]})
    assert row.prompt == tuple(shared) and row.chosen == (assistant("d"),) and row.rejected == (assistant("e"),)


def test_completions_that_repeat_an_explicit_prompt_are_cut_after_it(tmp_path):
    for head in ([], [{"role": "system", "content": "s"}]):
        row = read_one(tmp_path, {"prompt": "a", "chosen": [*head, user("a"), assistant("d")],
                                  "rejected": [*head, user("a"), assistant("e")]})
        assert row.prompt == (*head, user("a")) and row.rejected == (assistant("e"),)


def test_a_continuation_may_hold_several_turns(tmp_path):
    row = read_one(tmp_path, {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                              "rejected": [user("a"), assistant("e")]})
    assert row.prompt == (user("a"),) and row.chosen == (assistant("b"), user("c"), assistant("d"))


def test_tool_calls_and_tools_are_objects_even_where_the_file_has_json_text(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {**calls("add", '{"a": 2}'), "content": None}
    row = read_one(tmp_path, {"prompt": "2 + 2?", "tools": json.dumps([tool]), "rejected": "Five.",
                              "chosen": [call, {"role": "tool", "content": "4"}, assistant("Four.")]}, "messages")
    assert row.tools == (tool,) and row.chosen[0]["content"] == ""
    assert row.chosen[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}


def test_nulls_that_a_parquet_schema_puts_into_messages_are_gone(tmp_path):
    datasets = pytest.importorskip("datasets")
    call = calls("f", {"a": 1})
    rows = [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [call]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (row,), _ = read(tmp_path / "rows.parquet")
    assert row.chosen == (assistant("b"),) and row.rejected == (call,) and row.where.endswith("rows.parquet:row 1")


def test_sharegpt_speakers_become_roles(tmp_path):
    says = [("system", "s"), ("human", "a"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            ("observation", "7"), ("gpt", "b"), ("user", "c")]
    row = read_one(tmp_path, {"conversations": [{"from": f, "value": v} for f, v in says],
                              "chosen": {"from": "gpt", "value": "d"},
                              "rejected": [{"from": "assistant", "value": "e"}], "tools": "[]"})
    assert [m["role"] for m in row.prompt] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert row.prompt[2] == calls("f", {"x": 1})
    assert row.chosen == (assistant("d"),) and row.rejected == (assistant("e"),)


def test_hh_transcripts_share_all_but_the_last_answer(tmp_path):
    shared = "\n\nHuman: a\n\nwith a gap\n\nAssistant: b\n\nHuman: c"
    row = read_one(tmp_path, {"chosen": shared + "\n\nAssistant: d", "rejected": shared + "\n\nAssistant: e"})
    assert row.prompt == (user("a\n\nwith a gap"), assistant("b"), user("c"))
    assert row.chosen == (assistant("d"),) and row.rejected == (assistant("e"),)


def test_hh_transcripts_that_part_at_an_earlier_answer_have_longer_completions(tmp_path):
    row = read_one(tmp_path, {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                              "rejected": "\n\nHuman: a\n\nAssistant: e\n\nHuman: c\n\nAssistant: d"})
    assert row.prompt == (user("a"),) and row.rejected == (assistant("e"), user("c"), assistant("d"))


def test_hh_turns_of_one_speaker_in_a_row_are_one_turn(tmp_path):
    row = read_one(tmp_path, {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
                              "rejected": "\n\nHuman: a\n\nAssistant: b"})
    assert row.chosen == (assistant("b\n\nc"),) and row.rejected == (assistant("b"),)


def test_bad_hh_transcripts_say_why(tmp_path):
    counts = reasons(tmp_path, "hh", {"chosen": "\n\nHuman: a\n\nAssistant: b",
                                      "rejected": "\n\nHuman: z\n\nAssistant: b"},
                     {"chosen": "Once upon a time", "rejected": "\n\nHuman: z\n\nAssistant: b"},
                     {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"},
                     {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"})
    assert counts == {"chosen and rejected part at a user turn, not at an answer": 2,
                      "chosen does not begin with 'Human:'": 1,
                      "chosen is empty": 1}


def test_ratings_give_every_pair_of_different_ratings(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [1, 4, 4.5]},
                       {"prompt": "q", "responses": ["d", "e"], "scores": [2, 2]})
    rows, report = read(path)
    assert [(r.chosen, r.rejected, r.strength) for r in rows] == [("b", "a", 3.0), ("c", "a", 3.5), ("c", "b", 0.5)]
    assert (report.rows, report.pairs, report.ties) == (2, 3, 1)


def test_ratings_may_stand_beside_or_within_the_responses(tmp_path):
    for row in ({"prompt": "p", "responses": [{"text": "a", "rating": 1}, {"response": "b", "score": 2}]},
                {"instruction": "p", "completions": [{"response": "a", "overall_score": 1.0, "model": "m"},
                                                     {"response": "b", "overall_score": 2.0, "model": "n"}]}):
        got = read_one(tmp_path, row)
        assert (got.prompt, got.chosen, got.rejected, got.strength) == ("p", "b", "a", 1.0)
    got = read_one(tmp_path, {"prompt": [user("p")], "responses": [assistant("a"), "b"], "ratings": [1, 2]})
    assert (got.prompt, got.chosen, got.rejected) == ((user("p"),), (assistant("b"),), (assistant("a"),))


def test_one_bad_pair_of_a_rated_row_leaves_the_others(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "p", "responses": ["a", "a", "c"], "ratings": [1, 2, 3]})
    rows, report = read(path, on_bad_row="skip")
    assert [(r.chosen, r.rejected) for r in rows] == [("c", "a"), ("c", "a")]
    assert report.bad.counts == {"chosen and rejected are identical": 1}


def test_bad_ratings_say_why(tmp_path):
    two = {"prompt": "p", "responses": ["a", "b"]}
    assert reasons(tmp_path, "ratings", {**two, "ratings": [1]}) == {"ratings and responses differ in number": 1}
    assert reasons(tmp_path, "ratings", {**two, "ratings": [1, "N/A"]}) == {"rating is not a number": 1}
    assert reasons(tmp_path, "ratings", two) == {"a response has no text, or there are no ratings beside the "
                                                 "responses": 1}
    assert reasons(tmp_path, "ratings", {**two, "responses": ["a"]}) == {"responses is not a list of two or more": 1}
    assert reasons(tmp_path, "ratings", {"responses": ["a", "b"], "ratings": [1, 2]}) == {"prompt is missing": 1}


def test_token_ids_are_taken_as_they_are(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt_ids": [1], "chosen_ids": [2, 0], "rejected_ids": [3],
                                                 "strength": 2})
    assert read(path)[0] == [TokenizedPair((1,), (2, 0), (3,), f"{path}:1", str(path), 2.0, 1.0)]


# ----------------------------------------------------------------------------------------------------------------- auto


def test_each_format_is_told_from_its_fields():
    hh = "\n\nHuman: a\n\nAssistant: "
    for name, fields in {
        "preference": PLAIN, "messages": {"chosen": [user("a")], "rejected": []}, "hh": {"chosen": hh, "rejected": hh},
        "sharegpt": {"conversations": [], "chosen": {}, "rejected": {}},
        "ratings": {"prompt": "", "responses": [], "scores": []},
        "token_ids": {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []},
    }.items():
        assert detect_format(fields, "here") == name


def test_unknown_fields_are_an_error_that_lists_them_and_what_formats_need(tmp_path):
    with pytest.raises(UserError) as error:
        read(write_lines(tmp_path / "rows.jsonl", {"question": "a", "good": "b", "bad": "c"}))
    assert "rows.jsonl:1: no format fits the fields question, good, bad" in str(error.value)
    assert all(f"\n  {name}: " in str(error.value) for name in FORMATS)


def test_fields_of_two_formats_are_an_error_that_names_both(tmp_path):
    with pytest.raises(UserError, match=r"several formats \(preference, ratings\) fit"):
        read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "responses": ["a", "b"], "ratings": [1, 2]}))


# ----------------------------------------------------------------------------------------------------------- real data


@needs_shared
def test_all_of_hh_harmless_reads_but_four_rows_with_an_empty_answer():
    path = SHARED / "hh_harmless_test.jsonl.gz"
    rows, report = read(path, on_bad_row="skip")
    assert (report.format, report.rows, len(rows)) == ("hh", 2312, 2308)
    assert report.bad.counts == {"chosen is empty": 4}
    assert report.bad.examples["chosen is empty"][0] == f"{path}:87: chosen is empty"


@needs_shared
def test_all_of_the_sharegpt_demo_reads():
    rows, report = read(SHARED / "dpo_en_demo.json")
    assert (report.format, report.rows, len(rows), report.bad.counts) == ("sharegpt", 300, 300, {})
    assert all(row.prompt[-1]["role"] == "user" for row in rows)
