"""The formats of other trainers, labellers and data sets: a small file of each, made after its documentation."""
from __future__ import annotations

from pathlib import Path

import pytest
from row_files import PLAIN, assistant, calls, read, reasons, user, write_lines

from dpo_dist.types import PreferenceRow

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def told(tmp_path: Path, format: str, *rows: dict) -> list[PreferenceRow]:
    """The pairs of the rows, which `auto` must take for this format, and which read the same where it is named."""
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    found, report = read(path)
    assert report.format == format
    assert read(path, format)[0] == found
    return [row for row in found if isinstance(row, PreferenceRow)]


# ------------------------------------------------------------------------------------------------------- other trainers


def test_openai_preference_files(tmp_path):
    (row,) = told(tmp_path, "openai", {
        "input": {"messages": [user("Cold?")], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [assistant("Yes.")], "non_preferred_output": [assistant("No.")]})
    assert (row.prompt, row.chosen, row.rejected) == ((user("Cold?"),), (assistant("Yes."),), (assistant("No."),))
    assert row.tools == (TOOL,)


def test_openai_calls_from_before_there_were_tool_calls_are_tool_calls(tmp_path):
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"unit": null}'}}
    answer = {"role": "function", "name": "weather", "content": "18C"}
    (row,) = told(tmp_path, "openai", {
        "input": {"messages": [user("Cold?"), old, answer], "functions": [TOOL["function"]]},
        "preferred_output": [old], "non_preferred_output": [assistant("No.")]})
    assert row.prompt[1:] == (calls("weather", {"unit": None}), {"role": "tool", "name": "weather", "content": "18C"})
    assert row.chosen == (calls("weather", {"unit": None}),) and row.tools == (TOOL,)


def test_swift_rows_end_with_the_chosen_answer(tmp_path):
    (row,) = told(tmp_path, "swift", {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")],
                                      "rejected_response": "e", "images": []})
    assert row.prompt == (system("s"), user("a"), assistant("b"), user("c"))
    assert (row.chosen, row.rejected) == ((assistant("d"),), (assistant("e"),))


def test_swift_rows_may_have_two_whole_chats(tmp_path):
    (row,) = told(tmp_path, "swift", {"messages": [user("a"), assistant("b")],
                                      "rejected_messages": [user("a"), assistant("c"), user("d"), assistant("e")]})
    assert (row.prompt, row.chosen) == ((user("a"),), (assistant("b"),))
    assert row.rejected == (assistant("c"), user("d"), assistant("e"))


def test_swift_roles_of_tools_are_calls_and_their_answers(tmp_path):
    call = {"role": "tool_call", "content": '{"name": "weather", "arguments": {"town": "Rome"}}'}
    (row,) = told(tmp_path, "swift", {
        "messages": [user("a"), call, call, {"role": "tool_response", "content": "18C"}, assistant("b")],
        "rejected_response": "c", "tools": [TOOL]})
    assert [turn["role"] for turn in row.prompt] == ["user", "assistant", "tool"]
    assert len(row.prompt[1]["tool_calls"]) == 2         # calls made at once are one turn
    assert row.tools == (TOOL,)


def test_swift_rows_of_query_and_response(tmp_path):
    (row,) = told(tmp_path, "swift", {"system": "s", "query": "c", "response": "d", "rejected_response": "e",
                                      "history": [["a", "b"]]})
    assert row.prompt == (system("s"), user("a"), assistant("b"), user("c")) and row.rejected == (assistant("e"),)


def test_swift_rows_without_a_chosen_answer_say_so(tmp_path):
    assert reasons(tmp_path, "swift", {"messages": [user("a")], "rejected_response": "b"}) == {
        "messages does not end with an assistant turn, the chosen answer": 1}


def test_llama_factory_rows_put_the_input_below_the_instruction(tmp_path):
    rows = told(tmp_path, "alpaca", {"instruction": "Add.", "input": "2 2", "chosen": "4", "rejected": "5"},
                {"instruction": "Add 2 and 2.", "input": "", "chosen": "4", "rejected": "5"})
    assert [row.prompt for row in rows] == ["Add.\n2 2", "Add 2 and 2."]
    assert [(row.chosen, row.rejected) for row in rows] == [("4", "5")] * 2


def test_llama_factory_rows_may_have_system_and_history(tmp_path):
    (row,) = told(tmp_path, "alpaca", {"instruction": "c", "input": "", "chosen": "d", "rejected": "e", "system": "s",
                                       "history": [["a", "b"]]})
    assert row.prompt == (system("s"), user("a"), assistant("b"), user("c")) and row.chosen == (assistant("d"),)
    assert reasons(tmp_path, "alpaca", {"instruction": "c", "chosen": "d", "rejected": "e", "history": ["a"]}) == {
        "history is not a list of [question, answer]": 1}


@pytest.mark.parametrize("row", [
    {"instruction": "q", "chosen_response": "x", "rejected_response": "y"},
    {"question": "q", "chosen_response": "x", "rejected_response": "y"},
    {"question": "q", "chosen": "x", "rejected": "y"},
    {"input": "q", "chosen": "x", "rejected": "y"},
    {"prompt": "q", "chosen_response": "x", "rejected_response": "y"},
])
def test_axolotl_rows_have_several_names_for_the_same(tmp_path, row):
    (got,) = told(tmp_path, "axolotl", row)
    assert (got.prompt, got.chosen, got.rejected) == ("q", "x", "y")
    (with_system,) = told(tmp_path, "axolotl", {**row, "system": "s"})
    assert with_system.prompt == (system("s"), user("q"))


def test_nemo_rl_rows_are_pairs_of_ranks_of_which_the_lowest_is_best(tmp_path):
    rows = told(tmp_path, "nemo_rl", {"context": [user("q")], "completions": [
        {"rank": 1, "completion": [assistant("y")]}, {"rank": 0, "completion": [assistant("x")]},
        {"rank": 2, "completion": [assistant("z")]}]})
    assert [(row.chosen[0]["content"], row.rejected[0]["content"], row.strength) for row in rows] == [
        ("x", "y", 1.0), ("y", "z", 1.0), ("x", "z", 2.0)]
    assert rows[0].record == {"chosen_rank": 0.0, "rejected_rank": 1.0}


# ---------------------------------------------------------------------------------------------------- ratings by models


def test_distilabel_generations(tmp_path):
    row, *_ = told(tmp_path, "distilabel", {
        "instruction": "q", "generations": ["x", "y", None], "ratings": [5.0, 3.5, None],
        "generation_models": ["m", "n", "o"], "system_prompt": "s", "distilabel_metadata": {"raw": None}})
    assert (row.prompt, row.chosen, row.rejected) == ((system("s"), user("q")), (assistant("x"),), (assistant("y"),))
    assert row.strength == 1.5 and row.record == {"chosen_rating": 5.0, "chosen_model": "m", "rejected_rating": 3.5,
                                                  "rejected_model": "n"}


def test_distilabel_generations_of_which_one_has_a_rating_are_no_pair(tmp_path):
    assert reasons(tmp_path, "distilabel", {"instruction": "q", "generations": ["x", None], "ratings": [5, None]}) == {
        "fewer than two generations have a rating": 1}


def test_distilabel_rows_whose_prompt_is_the_first_question_of_a_longer_chat(tmp_path):
    chat = [user("q"), assistant("r"), user("s")]
    (row,) = told(tmp_path, "messages", {
        "prompt": "q", "prompt_id": "b2", "chosen": [*chat, assistant("x")], "rejected": [*chat, assistant("y")],
        "chosen_rating": 5.0, "rejected_rating": 2.0, "chosen_model": "m", "rejected_model": "n",
        "instruction": "q", "generations": ["x", "y"], "ratings": [5, 2]})
    assert (row.prompt, row.chosen, row.strength) == (tuple(chat), (assistant("x"),), 3.0)
    assert row.record == {"columns": {"prompt_id": "b2"}, "chosen_rating": 5.0, "chosen_model": "m",
                          "rejected_rating": 2.0, "rejected_model": "n"}


def test_ultrafeedback_completions(tmp_path):
    (row,) = told(tmp_path, "ultrafeedback", {
        "source": "evol_instruct", "instruction": "q", "models": ["m", "n"], "correct_answers": ["None"],
        "completions": [
            {"model": "m", "response": "x", "overall_score": 7.5, "fine-grained_score": 4.75, "critique": "good",
             "annotations": {"honesty": {"Rating": "4", "Rationale": "r"}, "truthfulness": {"Rating": "N/A"}}},
            {"model": "n", "response": "y", "overall_score": 4.0, "annotations": {"honesty": {"Rating": "2"}}}]})
    assert (row.prompt, row.chosen, row.rejected, row.strength) == ("q", "x", "y", 3.5)
    assert row.record == {"chosen_rating": 7.5, "chosen_model": "m", "chosen_aspects": {"honesty": 4.0},
                          "rejected_rating": 4.0, "rejected_model": "n", "rejected_aspects": {"honesty": 2.0},
                          "columns": {"source": "evol_instruct", "chosen_fine-grained_score": 4.75,
                                      "chosen_critique": "good"}}


def test_ultrafeedback_binarized(tmp_path):
    chosen, rejected = [user("q"), assistant("x")], [user("q"), assistant("y")]
    (row,) = told(tmp_path, "messages", {"prompt": "q", "prompt_id": "f0", "chosen": chosen, "rejected": rejected,
                                         "messages": chosen, "score_chosen": 8.0, "score_rejected": 5.5})
    assert (row.prompt, row.chosen, row.strength) == ((user("q"),), (assistant("x"),), 2.5)
    assert row.record == {"columns": {"prompt_id": "f0"}, "chosen_rating": 8.0, "rejected_rating": 5.5}


@pytest.mark.parametrize("format", ["distilabel", "ultrafeedback", "preference", "messages"])
def test_binarized_rows_may_go_by_the_name_of_where_they_come_from(tmp_path, format):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": [user("q"), assistant("x")],
                                                 "rejected": [user("q"), assistant("y")],
                                                 "chosen_rating": 4, "rejected_rating": 1})
    (row,), _ = read(path, format)
    assert isinstance(row, PreferenceRow) and (row.prompt, row.strength) == ((user("q"),), 3.0)


# ----------------------------------------------------------------------------------------------------------- annotators


def test_helpsteer_preferences_below_zero_are_for_the_first_response(tmp_path):
    row = {"domain": "code", "language": "python", "context": [user("q")], "response1": "x", "response2": "y",
           "individual_preference": [{"score": -2, "reasoning": "r", "feedback1": "f", "feedback2": "g"},
                                     {"score": 1, "reasoning": "s", "feedback1": None, "feedback2": "h"}]}
    first, second = told(tmp_path, "helpsteer", {**row, "overall_preference": -2}, {**row, "overall_preference": 1})
    assert (first.chosen, first.rejected, first.strength) == ((assistant("x"),), (assistant("y"),), 2.0)
    assert (second.chosen, second.rejected, second.strength) == ((assistant("y"),), (assistant("x"),), 1.0)
    assert first.record == {"tags": {"domain": "code", "language": "python"}, "annotators": [
        {"preference": "chosen", "strength": 2.0, "reason": "r", "chosen_feedback": "f", "rejected_feedback": "g"},
        {"preference": "rejected", "strength": 1.0, "reason": "s", "rejected_feedback": "h"}]}
    assert [a["preference"] for a in second.record["annotators"]] == ["rejected", "chosen"]


def test_helpsteer_preferences_of_zero_are_ties(tmp_path):
    row = {"context": [user("q")], "response1": "x", "response2": "y", "individual_preference": []}
    _, report = read(write_lines(tmp_path / "rows.jsonl", {**row, "overall_preference": 0}))
    assert (report.format, report.pairs, report.ties) == ("helpsteer", 0, 1)


def test_helpsteer2_preferences(tmp_path):
    (row,) = told(tmp_path, "helpsteer", {"prompt": "q", "response_1": "x", "response_2": "y", "split": "train",
                                          "preference_strength": 3, "preference_statement": "s"})
    assert (row.prompt, row.chosen, row.rejected, row.strength) == ("q", "y", "x", 3.0)


ARGILLA_2 = {"id": "1", "_server_id": "2", "status": "completed", "inserted_at": "2024-07-01T00:00:00", "prompt": "q",
             "response_1": "x", "response_2": "y", "text-descriptives": {"n_tokens": 4, "reading_time": 0.1},
             "preference.responses": ["response_2", "response_2", "response_1", "response_1"],
             "preference.responses.users": ["u", "v", "w", "z"],
             "preference.responses.status": ["submitted", "submitted", "submitted", "draft"],
             "preference.suggestion": "response_1", "preference.suggestion.score": 0.7,
             "preference.suggestion.agent": "a model"}


def test_argilla_records_give_one_pair_by_the_majority_of_submitted_answers(tmp_path):
    (row,) = told(tmp_path, "argilla", ARGILLA_2)
    assert (row.prompt, row.chosen, row.rejected) == ("q", "y", "x")
    assert row.strength == pytest.approx(1 / 3)          # two of three, against one
    assert row.record == {
        "annotators": [{"annotator": "u", "preference": "chosen", "status": "submitted"},
                       {"annotator": "v", "preference": "chosen", "status": "submitted"},
                       {"annotator": "w", "preference": "rejected", "status": "submitted"},
                       {"annotator": "z", "preference": "rejected", "status": "draft"}],
        "suggestion": {"preference": "rejected", "agent": "a model", "score": 0.7},
        "columns": {"id": "1", "status": "completed", "inserted_at": "2024-07-01T00:00:00",
                    "text-descriptives.n_tokens": 4, "text-descriptives.reading_time": 0.1}}


def test_argilla_draws_are_ties_and_records_that_nobody_judged_are_counted(tmp_path):
    draw = {**ARGILLA_2, "preference.responses": ["response_2", "response_1"],
            "preference.responses.users": ["u", "v"], "preference.responses.status": ["submitted"] * 2}
    both = {**draw, "preference.responses": ["tie", "both are bad"]}
    draft = {**draw, "preference.responses.status": ["draft", "discarded"]}
    pending = {key: None if key.startswith("preference") else value for key, value in ARGILLA_2.items()}
    rows, report = read(write_lines(tmp_path / "rows.jsonl", pending, draft, draw, both, ARGILLA_2))
    assert (report.format, report.rows, len(rows), report.ties) == ("argilla", 5, 1, 2)
    assert report.no_pair == {"no submitted answer": 2}


@pytest.mark.parametrize("preference", [
    [{"user_id": "u", "value": "response-2", "status": "submitted"}],
    [{"user_id": "u", "value": [{"rank": 2, "value": "response-1"}, {"rank": 1, "value": "response-2"}],
      "status": "submitted"}],
    {"user_id": ["u"], "value": [{"rank": [2, 1], "value": ["response-1", "response-2"]}], "status": ["submitted"]},
])
def test_argilla_1_records_have_labels_or_rankings(tmp_path, preference):
    (row,) = told(tmp_path, "argilla", {
        "instruction": "q", "response-1": "x", "response-2": "y", "preference": preference, "external_id": None,
        "preference-suggestion": None, "preference-suggestion-metadata": {"agent": None}, "metadata": "{}"})
    assert (row.prompt, row.chosen, row.rejected) == ("q", "y", "x")
    assert row.record == {"annotators": [{"annotator": "u", "preference": "chosen", "status": "submitted"}]}


@pytest.mark.parametrize("value", [
    "response_2", "Response 2", "response-2 is slightly better", "2", "second", "right", ["response_2", "response_1"],
    ["response_2"], [{"value": "response_1", "rank": 2}, {"value": "response_2", "rank": 1}],
])
def test_argilla_annotators_name_the_better_answer_in_many_ways(tmp_path, value):
    (row,) = told(tmp_path, "argilla", {"prompt": "q", "response_1": "x", "response_2": "y", "model_1": "m",
                                        "model_2": "n", "better.responses": [value], "why.responses": ["so"]})
    assert (row.chosen, row.rejected, row.strength) == ("y", "x", 1.0)


def test_argilla_rankings_of_three_answers_give_all_pairs(tmp_path):
    rows = told(tmp_path, "argilla", {"prompt": "q", "answer-a": "x", "answer-b": "y", "answer-c": "z",
                                      "order.responses": [["answer-b", "answer-c", "answer-a"]]})
    assert [(row.chosen, row.rejected) for row in rows] == [("y", "x"), ("z", "x"), ("y", "z")]


def test_argilla_records_as_they_are(tmp_path):
    (row,) = told(tmp_path, "argilla", {
        "id": "1", "fields": {"prompt": [user("q")], "response_a": "x", "response_b": "y"}, "metadata": {},
        "suggestions": {"better": {"value": "B", "score": None, "agent": "m"}}, "vectors": {},
        "responses": {"better": [{"value": "Response B", "user_id": "u"}, {"value": "B", "user_id": "v"}]}})
    assert (row.prompt, row.chosen, row.rejected, row.strength) == ((user("q"),), (assistant("y"),),
                                                                   (assistant("x"),), 1.0)
    assert row.record["suggestion"] == {"preference": "chosen", "agent": "m"}


def test_argilla_annotators_may_turn_chosen_and_rejected_round(tmp_path):
    (row,) = told(tmp_path, "argilla", {**PLAIN, "better.responses": ["rejected"], "better.responses.users": ["u"],
                                        "quality.responses": [4], "quality.responses.users": ["u"]})
    assert (row.chosen, row.rejected) == (PLAIN["rejected"], PLAIN["chosen"])


def test_argilla_answers_to_other_questions_leave_a_pair_as_it_is(tmp_path):
    (row,) = told(tmp_path, "preference", {**PLAIN, "quality.responses": [4, 5], "quality.responses.users": ["u", "v"]})
    assert row.chosen == PLAIN["chosen"]


def test_argilla_labels_that_name_no_answer_say_so(tmp_path):
    assert reasons(tmp_path, "argilla", {**ARGILLA_2, "preference.responses": ["great", "response_1", "x", "y"]}) == {
        "no question whose values are names of the answers": 1}


# ------------------------------------------------------------------------------------------------------------------ KTO


def good_or_bad(prompt: object, completion: object, label: object, **more: object) -> dict:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def test_kto_rows_are_paired_by_prompt_in_their_order_and_the_others_counted(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", good_or_bad("q", "x1", True), good_or_bad("p", "y", False),
                       good_or_bad("q", "x2", True), good_or_bad("q", "y1", False), good_or_bad("q", "y2", False),
                       good_or_bad("q", "y3", False))
    rows, report = read(path)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [("q", "x1", "y1"), ("q", "x2", "y2")]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert (report.format, report.rows, report.pairs) == ("kto", 6, 2)
    assert report.no_pair == {"no answer to the same prompt with the other label": 2}


def test_kto_rows_may_be_chats_with_tools(tmp_path):
    more = {"tools": [TOOL], "tags": ["a"]}
    (row,) = told(tmp_path, "kto", good_or_bad([user("q")], [assistant("y")], False, **more),
                  good_or_bad([user("q")], [assistant("x")], True, **more))
    assert (row.prompt, row.chosen, row.rejected) == ((user("q"),), (assistant("x"),), (assistant("y"),))
    assert row.tools == (TOOL,) and row.record == {"tags": ["a"]}


@pytest.mark.parametrize("good, bad", [
    ({"messages": [user("q"), assistant("x")], "label": True},
     {"messages": [user("q"), assistant("y")], "label": False}),
    ({"instruction": "q", "input": "", "output": "x", "kto_tag": True},
     {"instruction": "q", "input": "", "output": "y", "kto_tag": False}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "kto_tag": 1},
     {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "y"}], "kto_tag": 0}),
])
def test_kto_rows_of_other_trainers(tmp_path, good, bad):
    (row,) = told(tmp_path, "kto", good, bad)
    texts = [part if isinstance(part, str) else part[0]["content"] for part in (row.prompt, row.chosen, row.rejected)]
    assert texts == ["q", "x", "y"]


def test_kto_prompts_under_different_system_texts_are_different_prompts(tmp_path):
    _, report = read(write_lines(tmp_path / "rows.jsonl", good_or_bad("q", "x", True, system="s"),
                                 good_or_bad("q", "y", False, system="t")))
    assert (report.pairs, sum(report.no_pair.values())) == (0, 2)


def test_kto_labels_that_are_neither_true_nor_false_say_so(tmp_path):
    assert reasons(tmp_path, "kto", good_or_bad("q", "x", "great")) == {"label is neither true nor false": 1}
