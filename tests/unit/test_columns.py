"""Whose columns are whose, which rows are taken, and what hub sets are asked for."""
from __future__ import annotations

import csv
import json
import random

import pytest
from row_files import PLAIN, assistant, read, user, write_lines

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.rows import read_rows

OWN = {"question": "Two and two?", "good": "Four.", "answers": {"bad": "Five."}, "weight": "heavy", "prompt": 7}
NAMES = {"prompt": "question", "chosen": "good", "rejected": "answers.bad", "weight": None}


def test_own_columns_take_the_place_of_those_that_formats_know(tmp_path):
    (row,), report = read(write_lines(tmp_path / "rows.jsonl", OWN), columns=NAMES)
    assert report.format == "preference"
    assert (row.prompt, row.chosen, row.rejected, row.weight) == ("Two and two?", "Four.", "Five.", 1.0)


def test_columns_may_change_places(tmp_path):
    (row,), _ = read(write_lines(tmp_path / "rows.jsonl", PLAIN), columns={"chosen": "rejected", "rejected": "chosen"})
    assert (row.chosen, row.rejected) == ("Five.", "Four.")


def test_a_column_that_one_row_lacks_is_a_bad_row_and_one_that_all_lack_an_error(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", OWN, {key: OWN[key] for key in ("question", "good")})
    rows, report = read(path, on_bad_row="skip", columns=NAMES)
    assert (len(rows), report.bad.counts) == (1, {"rejected is missing": 1})
    for format in ("auto", "preference"):
        with pytest.raises(UserError, match=r"columns names 'godo', which no row of"):
            read(path, format, "skip", columns={**NAMES, "chosen": "godo"})


def test_a_misspelt_name_of_ours_is_an_error_and_a_name_of_a_data_sets_own_question_is_not(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", OWN)
    with pytest.raises(UserError, match=r"columns=\{wieght: weight\} names nothing .* did you mean weight\?"):
        read(path, columns={**NAMES, "wieght": "weight"})
    (row,), _ = read(path, columns={**NAMES, "which-is-better.responses": "good"})
    assert row.chosen == "Four."


def test_a_reserved_name_that_holds_something_else_is_a_bad_row_that_says_how_to_map_it_away(tmp_path):
    for name, value in (("weight", "heavy"), ("margin", "large"), ("tools", "Excel, Word"), ("system", ["x"]),
                        ("chat_template_kwargs", "on"), ("images", ["a.png"]), ("strength", {"a": 1})):
        path = write_lines(tmp_path / "rows.jsonl", {**PLAIN, name: value})
        with pytest.raises(UserError, match=rf"{name} is a reserved name: .* columns: \{{{name}: null\}}"):
            read(path)
        assert len(read(path, columns={name: None})[0]) == 1


def test_the_command_takes_columns():
    config = compose(["model.path=m", "data.train=[{path: a.jsonl, columns: {prompt: input.messages, weight: null}, "
                      "rows: 5}]"])
    dataset = config.data.train[0]
    assert (dataset.columns, dataset.rows) == ({"prompt": "input.messages", "weight": None}, 5)


def test_a_column_that_has_its_name_already_is_an_error():
    with pytest.raises(UserError, match=r"data.eval\[0\].columns.prompt=prompt would do nothing"):
        compose(["model.path=m", "data.train=a.jsonl", "data.eval=[{path: b.jsonl, columns: {prompt: prompt}}]"])


# ---------------------------------------------------------------------------------------------------- text that is data


CHAT = [user("Two and two?"), assistant("Four.")]


@pytest.mark.parametrize("cell", [json.dumps(CHAT), json.dumps(CHAT, indent=1), repr(CHAT)])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_chats_that_stand_as_text_in_a_cell_are_chats(tmp_path, cell, kind):
    row = {"chosen": cell, "rejected": json.dumps([CHAT[0], assistant("Five.")]), "note": "[x"}
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, row)
            writer.writeheader()
            writer.writerow(row)
    elif kind == "jsonl":
        write_lines(path, row)
    else:
        pytest.importorskip("datasets").Dataset.from_list([row]).to_parquet(path)
    (found,), report = read(path)
    assert report.format == "messages"
    assert (found.prompt, found.chosen, found.rejected) == ((CHAT[0],), (CHAT[1],), (assistant("Five."),))


@pytest.mark.parametrize("text", ["[1] is a footnote", "[{", '[{"role": "CEO", "content": "x"}]', '["a", "b"]',
                                  '{"content": "an answer in JSON"}', "[{'role'", '{"role": "x'])
def test_text_that_only_begins_like_a_chat_stays_text(tmp_path, text):
    (row,), _ = read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "chosen": text}))
    assert row.chosen == text


def test_a_chat_as_numpy_prints_it_is_refused(tmp_path):
    printed = "[{'content': 'Two?', 'role': 'user'}\n {'content': 'Four.', 'role': 'assistant'}]"
    with pytest.raises(UserError, match="chosen looks like a chat, but is neither JSON nor Python"):
        read(write_lines(tmp_path / "rows.jsonl", {**PLAIN, "chosen": printed}), "preference")
    assert len(read(write_lines(tmp_path / "own.jsonl", {**PLAIN, "raw": printed}))[0]) == 1


def test_numbers_and_lists_of_a_csv_are_text_that_is_read(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,responses,ratings,weight\nq,"[""a"", ""b""]","[1, 2.5]",2\n')
    (row,), report = read(tmp_path / "rows.csv")
    assert (report.format, row.chosen, row.strength, row.weight) == ("ratings", "b", 1.5, 2.0)
    (tmp_path / "argilla.csv").write_text(
        'prompt,response_1,response_2,best.responses,best.responses.status\n'
        'q,x,y,"[""response_2"", ""response_1""]","[\'submitted\', \'draft\']"\n')
    (row,), report = read(tmp_path / "argilla.csv")
    assert (report.format, row.chosen, row.strength) == ("argilla", "y", 1.0)
    (tmp_path / "kto.csv").write_text("prompt,completion,label\nq,x,True\nq,y,False\n")
    assert read(tmp_path / "kto.csv")[1].pairs == 1


# ----------------------------------------------------------------------------------------------------------- which rows


MANY = [{**PLAIN, "prompt": f"{n} and {n}?", "tags": [n % 7, None]} for n in range(300)]


def prompts(path, rows: int) -> list[str]:
    return [row.prompt for row in read(path, rows=rows)[0]]


def test_a_cap_takes_the_same_rows_whatever_their_order_and_the_kind_of_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = write_lines(tmp_path / "rows.jsonl", *MANY)
    taken = prompts(path, 40)
    assert len(taken) == 40 and taken == sorted(taken, key=lambda prompt: int(prompt.split()[0]))
    shuffled = random.Random(0).sample(MANY, len(MANY))
    datasets.Dataset.from_list(MANY).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "list.json").write_text(json.dumps([dict(reversed(row.items())) for row in MANY]))
    assert prompts(tmp_path / "rows.parquet", 40) == prompts(tmp_path / "list.json", 40) == taken
    assert sorted(prompts(write_lines(tmp_path / "shuffled.jsonl", *shuffled), 40)) == sorted(taken)


def test_a_higher_cap_keeps_what_a_lower_one_took(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *MANY)
    assert set(prompts(path, 10)) < set(prompts(path, 50)) < set(prompts(path, 300)) == set(prompts(path, 10**6))


def test_of_rows_with_the_same_content_a_cap_takes_the_first(tmp_path):
    rows, report = read(write_lines(tmp_path / "rows.jsonl", *[PLAIN] * 10), rows=3)
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "2", "3"] and report.rows == 3


def test_bad_lines_are_counted_whatever_the_cap(tmp_path):
    _, report = read(write_lines(tmp_path / "rows.jsonl", *MANY[:5], "{", "{"), on_bad_row="skip", rows=2)
    assert (report.pairs, report.bad.counts) == (2, {"broken JSON line": 2})


def test_a_cap_counts_the_pairs_that_kto_rows_give(tmp_path):
    rows = [{"prompt": f"{n}", "completion": f"{label}", "label": label} for label in (True, False) for n in range(20)]
    assert len(read(write_lines(tmp_path / "rows.jsonl", *rows), rows=6)[0]) == 6


# ----------------------------------------------------------------------------------------------------------- hub sets


def test_subset_and_revision_of_a_file_are_an_error(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PLAIN)
    for key in ("subset", "revision"):
        with pytest.raises(UserError, match=rf"data.train\[0\].{key}=x would do nothing"):
            compose(["model.path=m", f"data.train=[{{path: {path}, {key}: x}}]"])


def test_subset_and_revision_reach_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(*args: object, **kwargs: object) -> object:
        asked.update(args=args, **kwargs)
        return datasets.Dataset.from_list([PLAIN])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = read_rows(DatasetConfig("some/set", subset="preference", revision="v1", split="validation"), "error")
    assert [row.where for row in rows] == ["some/set/preference[validation]:row 1"]
    assert asked == {"args": ("some/set", "preference"), "split": "validation", "revision": "v1"}
