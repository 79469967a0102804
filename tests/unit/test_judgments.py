"""What a row says of its judgment is kept, whatever the format and however it is called, through tokenization and
parts into the store, where it can be asked for as columns."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from row_files import PLAIN, assistant, read, read_one, reasons, user, write_lines
from test_parts import TEMPLATE, assert_same
from test_store import build, byte_tokenizer, config, row

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.formats import FORMATS
from dpo_dist.data.formats.free import LONGEST_TEXT, MOST_COLUMNS
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore

ABOUT = {"confidence": 0.8, "annotator": "w17", "annotator_class": "expert", "locale": "de-AT", "tags": ["law", 3],
         "chosen_model": "m", "chosen_version": "2024-07", "rejected_model": "n", "rejected_version": 2,
         "subset": "chat", "turn": 3, "easy": True, "score": 0.25, "weight": 2}
RECORD = {"confidence": 0.8, "annotator": "w17", "annotator_class": "expert", "locale": "de-AT", "tags": ["law", 3],
          "chosen_model": "m", "chosen_version": "2024-07", "rejected_model": "n", "rejected_version": "2",
          "columns": {"subset": "chat", "turn": 3, "easy": True, "score": 0.25}}
TURNS = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
# a row of each format in which an answer's columns are those of the row
ROWS: dict[str, dict[str, Any]] = {
    "preference": PLAIN,
    "messages": {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
                 "rejected": {"from": "gpt", "value": "b"}},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "openai": {"input": {"messages": [user("q")]}, "preferred_output": [assistant("a")],
               "non_preferred_output": [assistant("b")]},
    "swift": {"messages": TURNS["chosen"], "rejected_response": "b"},
    "alpaca": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    "axolotl": {"question": "q", "chosen_response": "a", "rejected_response": "b"},
    "helpsteer": {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2},
    "argilla": {"instruction": "q", "response_1": "a", "response_2": "b", "preference.responses": ["response_1"]},
    "token_ids": {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    "nemo_rl": {"context": [user("q")], "completions": [{"rank": 0, "completion": [assistant("a")]},
                                                        {"rank": 1, "completion": [assistant("b")]}]},
    "distilabel": {"instruction": "q", "generations": ["a", "b"], "ratings": [2, 1]},
    "ultrafeedback": {"instruction": "q", "completions": [{"response": "a", "overall_score": 2},
                                                          {"response": "b", "overall_score": 1}]},
    "ratings": {"prompt": "q", "responses": ["a", "b"], "ratings": [2, 1]},
    "arena": {"conversation_a": TURNS["chosen"], "conversation_b": TURNS["rejected"], "winner": "model_a"},
}


def stored(tmp_path: Path, form: str, *rows: dict[str, Any], **changes: Any) -> PairStore:
    """The store of rows of this format, made of text with a chat template."""
    data = DatasetConfig(str(write_lines(tmp_path / f"{form}.jsonl", *rows)), form)
    return prepare(config(tmp_path, data, **changes), byte_tokenizer(TEMPLATE), "d")[0]


def test_every_format_but_kto_which_has_a_row_for_each_answer_is_tried():
    assert {*ROWS} == {*FORMATS} - {"kto"}


@pytest.mark.parametrize("form", ROWS)
def test_what_is_known_of_a_judgment_reaches_the_store_from_every_format(form: str, tmp_path: Path):
    pair = stored(tmp_path, form, {**ROWS[form], **ABOUT})[0]
    record = {key: value for key, value in pair.record.items()
              if key not in ("annotators", "chosen_rating", "rejected_rating", "chosen_rank", "rejected_rank")}
    assert record == RECORD
    assert pair.weight == pytest.approx(2 * 0.8)         # the row's weight, as sure as it is


def test_tags_that_stand_as_text_are_read_and_others_stay_as_they_are(tmp_path: Path):
    for tags, kept in (('["a", "b"]', ["a", "b"]), ('{"topic": "x"}', {"topic": "x"}), ("[not json", "[not json"),
                       ("a, b", "a, b")):
        assert read_one(tmp_path, {**PLAIN, "tags": tags}).record == {"tags": kept}


def test_other_names_that_files_use_mean_the_same(tmp_path: Path):
    got = read_one(tmp_path, {**PLAIN, "model_chosen": "m", "rejected_generator": "n", "version_chosen": "1",
                              "annotator_id": 7, "annotator_type": "crowd", "language": "German"})
    assert got.record == {"chosen_model": "m", "rejected_model": "n", "chosen_version": "1", "annotator": "7",
                          "annotator_class": "crowd", "locale": "German"}


def test_a_programming_language_is_no_locale_and_what_does_not_fit_a_name_is_a_free_column(tmp_path: Path):
    got = read_one(tmp_path, {**PLAIN, "language": "Python", "chosen_model": 5, "lang": "en", "locale": "en-GB"})
    assert got.record == {"locale": "en", "columns": {"language": "Python", "chosen_model": 5, "locale": "en-GB"}}


def test_annotators_in_the_records_own_shape_come_back_as_they_are(tmp_path: Path):
    people = [{"annotator": "u", "preference": "chosen"}, {"annotator": "v", "preference": "both_bad"}]
    assert read_one(tmp_path, {**PLAIN, "annotators": people}).record == {"annotators": people}
    assert read_one(tmp_path, {**PLAIN, "annotators": [{"name": "u"}]}).record == {}


@pytest.mark.parametrize("value", [0, 1.01, -0.5, 95])
def test_a_confidence_outside_its_range_is_a_bad_row_that_says_how_to_map_it_away(value: float, tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", {**PLAIN, "confidence": value})
    found = read(path, on_bad_row="skip")[1].bad
    assert found.counts == {"confidence is not above 0 and at most 1": 1}
    assert "columns: {confidence: null}" in found.examples["confidence is not above 0 and at most 1"][0]
    (mapped,), _ = read(path, columns={"confidence": None})
    assert mapped.weight == 1.0 and mapped.record == {}


def test_a_confidence_that_is_no_number_is_a_bad_row(tmp_path: Path):
    assert reasons(tmp_path, "preference", {**PLAIN, "confidence": "high"}) == {"confidence is not a number": 1}
    (csv,), _ = read(write_lines(tmp_path / "c.csv", "prompt,chosen,rejected,confidence", "q,a,b,0.5"))
    assert csv.weight == 0.5 and csv.record == {"confidence": 0.5}


def test_free_columns_are_small_values_of_the_file_in_its_order(tmp_path: Path):
    got = read_one(tmp_path, {"id": 7, **PLAIN, "long": "x" * (LONGEST_TEXT + 1), "list": [1], "none": None,
                              "empty": "", "short": "x" * LONGEST_TEXT,
                              "metadata": {"subset": "a", "deep": {"b": 1}, "n": 2.5},
                              "as_text": '{"p": "q", "r": [1]}', "image": None})
    assert got.record == {"columns": {"id": 7, "short": "x" * LONGEST_TEXT, "metadata.subset": "a", "metadata.n": 2.5,
                                      "as_text.p": "q"}}
    assert next(iter(got.record["columns"])) == "id"
    many = read_one(tmp_path, {**PLAIN, **{f"c{i}": i for i in range(50)}})
    assert list(many.record["columns"]) == [f"c{i}" for i in range(MOST_COLUMNS)]


def test_what_belongs_to_an_answer_goes_to_its_side(tmp_path: Path):
    (got,), _ = read(write_lines(tmp_path / "rated.jsonl", {"prompt": "q", "source": "s", "responses": [
        {"text": "a", "rating": 1, "model": "m", "version": 3, "seed": 11, "critique": "x" * 200},
        {"text": "b", "rating": 4, "generator": "n", "revision": "abc", "seed": 12}]}))
    assert got.record == {"chosen_rating": 4.0, "rejected_rating": 1.0, "chosen_model": "n", "rejected_model": "m",
                          "chosen_version": "abc", "rejected_version": "3",
                          "columns": {"source": "s", "chosen_seed": 12, "rejected_seed": 11}}
    (beside,), _ = read(write_lines(tmp_path / "beside.jsonl", {
        "prompt": "q", "responses": ["a", "b"], "ratings": [1, 4], "models": ["m", "n"], "versions": ["1", "2"]}))
    assert (beside.record["chosen_model"], beside.record["rejected_version"]) == ("n", "1")
    (people,), _ = read(write_lines(tmp_path / "argilla.jsonl", {
        "prompt": "q", "response_1": "a", "response_2": "b", "response_1_model": "m", "model_2": "n",
        "response_2_seed": 5, "preference.responses": ["response_2"]}))
    assert people.record["chosen_model"] == "n" and people.record["rejected_model"] == "m"
    assert people.record["columns"] == {"chosen_seed": 5}


def test_of_two_kto_rows_what_differs_belongs_to_its_answer_and_both_must_be_right(tmp_path: Path):
    rows = [{"prompt": "q", "completion": "good", "label": True, "model": "m", "score": 9, "confidence": 0.5,
             "set": "s", "seed": 1, "annotator": "u", "weight": 2},
            {"prompt": "q", "completion": "bad", "label": False, "model": "n", "score": 2, "confidence": 0.8,
             "set": "s", "seed": 2, "annotator": "v"}]
    for order in (rows, rows[::-1]):
        (got,), _ = read(write_lines(tmp_path / "kto.jsonl", *order))
        assert got.record == {
            "chosen_model": "m", "rejected_model": "n", "chosen_rating": 9.0, "rejected_rating": 2.0, "annotator": "u",
            "confidence": 0.4, "columns": {"set": "s", "chosen_seed": 1, "rejected_seed": 2}}
        assert got.weight == pytest.approx(0.8) and got.strength == 7.0


def test_helpsteers_domain_and_language_stand_beside_a_rows_own_tags(tmp_path: Path):
    got = read_one(tmp_path, {**ROWS["helpsteer"], "domain": "multilingual", "language": "german", "tags": {"a": 1}})
    assert got.record == {"locale": "german", "tags": {"domain": "multilingual", "language": "german", "a": 1}}


def test_records_are_columns_of_the_store_and_several_processes_write_the_same(tmp_path: Path):
    rows = [{"prompt": f"q{i}", "chosen": [assistant("a")], "rejected": [assistant("b")], "n": i,
             "tags": {"topic": "xy"[i % 2]}, **({"locale": "fr"} if i % 3 == 0 else {}), "confidence": (i + 1) / 40}
            for i in range(33)]
    rows[5] |= {"chosen_rating": 4, "rejected_rating": 1}
    data = DatasetConfig(str(write_lines(tmp_path / "rows.jsonl", *rows)), "messages", name="set")
    assert_same(config(tmp_path, data), tmp_path, byte_tokenizer(TEMPLATE))
    store = prepare(config(tmp_path, data), byte_tokenizer(TEMPLATE), "d")[0]
    assert store.facts("columns.n") == list(range(33)) and store.facts("tags.topic")[:3] == ["x", "y", "x"]
    assert store.facts("locale") == ["fr" if i % 3 == 0 else None for i in range(33)]
    assert store.facts("source") == ["set"] * 33 and store.facts("strength")[4:6] == [None, 3.0]
    assert store.facts("weight") == pytest.approx(store.facts("confidence"))
    assert store.facts("no.such") == [None] * 33 == store.facts("tie")
    assert store.fact_names() == {"columns.n": 33, "tags.topic": 33, "locale": 11, "confidence": 33,
                                  "chosen_rating": 1, "rejected_rating": 1}
    assert store.all_facts(["source", "locale"]) == {"source": store.facts("source"), "locale": store.facts("locale")}


def test_a_column_whose_name_has_a_dot_is_found_by_it(tmp_path: Path):
    store = build(tmp_path, [row([1], [2], [3], **{"meta": {"a": 1}, "b.c": "x"})])
    assert store.facts("columns.meta.a") == [1] and store.facts("columns.b.c") == ["x"]


def test_a_record_costs_what_its_json_takes(tmp_path: Path):
    with_columns = build(tmp_path, [row([1], [2], [3], subset="chat", turn=i) for i in range(50)])
    assert len(with_columns.records) == sum(len(json.dumps({"columns": {"subset": "chat", "turn": i}}))
                                            for i in range(50))
    assert not math.isnan(sum(with_columns.facts("columns.turn")))
