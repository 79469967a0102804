"""Files and bad rows: the same rows from every kind of file, and what is said of rows that do not fit."""
from __future__ import annotations

import gzip
import json
import os
import typing
from pathlib import Path

import pytest
from conftest import REPO
from row_files import PLAIN, assistant, calls, read, reasons, user, write_lines

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data import files
from dpo_dist.data.files import read_records
from dpo_dist.data.formats import FORMATS

SHARED = Path(os.environ.get("DPO_DIST_SHARED", Path(__file__).parents[3] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here; set DPO_DIST_SHARED")

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
    ({"chosen_counts": [1]}, "chosen_counts has another length than its ids"),
    ({"chosen_counts": [1, 2]}, "chosen_counts is not a list of 0 and 1"),
    ({"chosen_counts": [1.0, 0.0]}, "chosen_counts is not a list of 0 and 1"),
    ({"rejected_counts": "1"}, "rejected_counts is not a list of 0 and 1"),
    ({"rejected_counts": [[1]]}, "rejected_counts is not a list of 0 and 1"),
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


# ----------------------------------------------------------------------------------------------------------------- auto


def test_unknown_fields_are_an_error_that_lists_them_and_what_formats_need(tmp_path):
    with pytest.raises(UserError) as error:
        read(write_lines(tmp_path / "rows.jsonl", {"question": "a", "good": "b", "bad": "c"}))
    assert "rows.jsonl:1: no format fits the fields question, good, bad" in str(error.value)
    assert "columns: {prompt: question, chosen: good, rejected: bad}" in str(error.value)
    assert all(f"\n  {name}: " in str(error.value) for name in FORMATS)


def test_the_first_row_that_fits_decides_the_format(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"id": 1}, {**PLAIN, "rejected": None}, PLAIN)
    rows, report = read(path, on_bad_row="skip")
    assert (report.format, len(rows), report.rows) == ("preference", 1, 3)
    assert report.bad.counts == {"prompt is missing": 1, "rejected is missing": 1}
    with pytest.raises(UserError, match=r"2 bad row\(s\) of 3 .*\(format preference\)"):
        read(path)


def test_where_no_row_can_be_read_the_message_says_what_is_wrong_with_them(tmp_path):
    with pytest.raises(UserError, match=r"1 bad row\(s\) of 1 .*\(format messages\)(.|\n)*unknown role"):
        read(write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": [{"role": "bot", "content": "b"}],
                                                   "rejected": "c"}))


def test_a_pair_comes_before_the_ratings_that_it_was_made_from(tmp_path):
    (row,), report = read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "responses": ["a", "b"], "ratings": [1, 2]}))
    assert (report.format, row.chosen) == ("preference", PLAIN["chosen"])


def test_each_format_has_a_name_in_the_config_and_a_file_in_conf():
    named = typing.get_args(typing.get_type_hints(DatasetConfig)["format"])
    assert {*named} == {*FORMATS, "auto"}
    assert {path.stem for path in (REPO / "conf" / "data").glob("*.yaml")} == {*FORMATS, "default"}


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
