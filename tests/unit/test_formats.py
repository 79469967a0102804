"""The formats of rows made for this project, and of hh-rlhf: what each gives, and what it refuses."""
from __future__ import annotations

import json

from row_files import PLAIN, assistant, calls, read, read_one, reasons, user, write_lines

from dpo_dist.types import TokenizedPair


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
    assert rows[0].record == {"chosen_rating": 4.0, "rejected_rating": 1.0}


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
