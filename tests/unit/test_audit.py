"""Each kind of defect is found where a few of it are planted, and none in data without it."""
from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from made_tokenizers import CHATML, LLAMA3, bpe

from dpo_dist.audit.__main__ import audited
from dpo_dist.audit.findings import KINDS, Finding, finding, reaches
from dpo_dist.audit.languages import language_of
from dpo_dist.config.compose import compose
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.runtime.terminal import Terminal

SHARED = Path(os.environ.get("DPO_DIST_SHARED", "shared"))
SUBJECTS = ("the old bridge", "my bicycle", "a garden wall", "the school choir", "our village fair", "the night train",
            "a clay pot", "the harbour clock", "a wooden boat", "the stone oven", "her first novel", "the long winter",
            "a paper lantern", "the river path", "his grandfather", "the market hall", "an apple tree", "a radio play")
VERBS = ("repair", "describe", "paint", "explain", "measure", "remember", "compare", "protect", "rebuild", "improve")
PLACES = ("near the lake", "in the north", "on a hill", "at the museum", "behind the mill", "in a small town",
          "by the canal", "under the roof", "across the valley", "at my uncle's farm", "in the cellar", "on the coast")
REASONS = ("the paint is coming off", "nobody knows how it works", "winter is on its way", "we have little money",
           "the children asked for it", "it was promised long ago", "my knee still hurts", "the tools are missing",
           "half of the group left", "there is a strange noise", "the floor is uneven", "guests will come soon")
Row = dict[str, Any]


def sentence(r: random.Random) -> str:
    return (f"You should {r.choice(VERBS)} {r.choice(SUBJECTS)} {r.choice(PLACES)}, and it is good to know that "
            f"{r.choice(REASONS)}.")


def answer(r: random.Random) -> str:
    return " ".join(sentence(r) for _ in range(r.randint(2, 5)))


def clean(n: int = 300, seed: int = 0) -> list[Row]:
    """Rows without a defect, each prompt once."""
    r = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[f"How do I {r.choice(VERBS)} {r.choice(SUBJECTS)} {r.choice(PLACES)}? I ask because "
                f"{r.choice(REASONS)}, and we want to {r.choice(VERBS)} {r.choice(SUBJECTS)} as well. There is also "
                f"{r.choice(SUBJECTS)} {r.choice(PLACES)}, where {r.choice(REASONS)}."] = None
    return [{"prompt": prompt, "chosen": answer(r), "rejected": answer(r)} for prompt in prompts]


@cache
def model(folder: Path, template: str | None = CHATML) -> Path:
    """A folder with a tokenizer alone."""
    bpe(template).save_pretrained(folder / "model")
    return folder / "model"


def found(rows: list[Row], tmp_path: Path, *words: str, model_path: Path | None = None) -> dict[str, dict[str, Any]]:
    """{kind: finding} of rows that are written to a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return report(tmp_path, f"data.train={path}", *words, model_path=model_path)["by_kind"]


def report(tmp_path: Path, *words: str, model_path: Path | None = None) -> dict[str, Any]:
    """What audit.json would hold, with its findings by kind beside."""
    folder = model_path or tmp_path / "nothing"
    folder.mkdir(exist_ok=True)
    config = compose([f"model.path={folder}", f"data.cache_dir={tmp_path / 'tokens'}", "data.on_bad_row=skip",
                      f"reference.cache_dir={tmp_path / 'reference'}", *words])
    terminal = Terminal.start(str(tmp_path / "log"), is_main=True, capture=False)
    try:
        said = audited(config, load_tokenizer(folder), folder, terminal)
    finally:
        terminal.stop()
    assert json.loads(json.dumps(said)) == said, "it is written as JSON"
    return {**said, "by_kind": {entry["kind"]: entry for entry in said["findings"]}}


def at(tmp_path: Path, *lines: int) -> list[str]:
    return [f"{tmp_path / 'rows.jsonl'}:{line}" for line in lines]


def test_clean_rows_have_no_finding_at_all(tmp_path: Path):
    assert found(clean(600), tmp_path, model_path=model(tmp_path)) == {}


# ------------------------------------------------------------------------------------------------- rows against others


def test_repeated_contradicting_and_circling_judgments_are_found_among_many(tmp_path: Path):
    rows, r = clean(), random.Random(1)
    a, b = rows[3], rows[7]
    third = answer(r)
    rows += [a, {**b, "chosen": f"  {b['chosen']}", "rejected": b["rejected"].replace(" ", "  ")},       # white space
             {**rows[11], "chosen": rows[11]["rejected"], "rejected": rows[11]["chosen"]},
             {**rows[20], "chosen": rows[20]["rejected"], "rejected": third},
             {**rows[20], "chosen": third, "rejected": rows[20]["chosen"]}]
    seen = found(rows, tmp_path)
    assert seen.keys() == {"duplicate_pair", "contradiction", "preference_cycle"}
    assert (seen["duplicate_pair"]["count"], seen["duplicate_pair"]["examples"]) == (2, at(tmp_path, 301, 302))
    assert seen["duplicate_pair"]["details"]["same_as"] == at(tmp_path, 4, 8)
    assert (seen["contradiction"]["count"], seen["contradiction"]["examples"]) == (1, at(tmp_path, 303))
    assert seen["preference_cycle"]["examples"] == at(tmp_path, 21, 304, 305)
    assert seen["preference_cycle"]["details"] == {"circles": 1}


def test_a_chain_of_judgments_and_two_circles_that_share_an_answer_are_told_apart(tmp_path: Path):
    def judged(*pairs: str) -> list[Row]:
        return [{"prompt": "one prompt", "chosen": f"answer {p[0]}", "rejected": f"answer {p[1]}"} for p in pairs]

    assert "preference_cycle" not in found(judged("ab", "bc", "ac", "cd", "bd"), tmp_path)
    assert found(judged("ab", "bc", "ca", "ad", "de"), tmp_path)["preference_cycle"]["count"] == 3
    both = found(judged("ab", "ba"), tmp_path)
    assert "preference_cycle" not in both and both["contradiction"]["count"] == 1


@pytest.mark.parametrize("change", [
    lambda p: p.replace("How do I", "Please, how do I"), lambda p: p.upper() + " !", lambda p: p.replace(" also", ""),
    lambda p: p.replace("because", "since")])
def test_a_prompt_with_a_changed_word_is_nearly_the_same_and_another_filling_of_its_pattern_is_not(
        change: Callable[[str], str], tmp_path: Path):
    rows = clean()
    seen = found([*rows, {**clean(1, seed=9)[0], "prompt": change(rows[5]["prompt"])}], tmp_path)
    assert seen.keys() == {"near_duplicate_prompt"}
    assert seen["near_duplicate_prompt"]["examples"] == at(tmp_path, 301)
    assert seen["near_duplicate_prompt"]["details"]["same_as"] == at(tmp_path, 6)


def test_prompts_of_one_pattern_and_with_other_numbers_are_no_repetitions(tmp_path: Path):
    r = random.Random(2)
    rows = [{"prompt": f"What is {i} plus {i * 7 % 41}? Write the result as a number and show how you came to it, step "
                       "by step, as for a child.", "chosen": answer(r), "rejected": answer(r)} for i in range(200)]
    rows += [{"prompt": f"Write a short poem about {place} and {subject}.", "chosen": answer(r), "rejected": answer(r)}
             for subject in SUBJECTS for place in PLACES]
    assert "near_duplicate_prompt" not in found(rows, tmp_path)


def test_held_out_and_benchmark_prompts_in_training_are_leaks_and_nearly_the_same_ones_too(tmp_path: Path):
    rows, held_out = clean(), clean(100, seed=5)
    assert "leakage" not in found(rows, tmp_path, f"data.eval={write(tmp_path / 'held_out.jsonl', held_out)}")
    rows += [{**clean(1, seed=6)[0], "prompt": held_out[4]["prompt"]},
             {**clean(1, seed=7)[0], "prompt": held_out[8]["prompt"].replace("also", "really")}]
    leak = found(rows, tmp_path, f"data.eval={tmp_path / 'held_out.jsonl'}")["leakage"]
    assert (leak["severity"], leak["count"], leak["examples"]) == ("error", 2, at(tmp_path, 301, 302))
    assert leak["details"]["same_as"] == [f"{tmp_path / 'held_out.jsonl'}:{line}" for line in (5, 9)]
    near = found([*rows[:300], rows[301]], tmp_path, f"data.eval={tmp_path / 'held_out.jsonl'}")["leakage"]
    assert (near["severity"], near["details"]["nearly_the_same"]) == ("warning", 1)


@pytest.mark.parametrize("wrap", [lambda p: {"question": p, "answer": "42"}, lambda p: {"turns": [p, "And then?"]},
                                  lambda p: {"messages": [{"role": "user", "content": p}]},
                                  lambda p: {"prompt": p, "chosen": "a", "rejected": "b", "subset": "x"}])
def test_benchmarks_of_whatever_shape_are_compared_by_their_prompts(wrap: Callable[[str], Row], tmp_path: Path):
    rows = clean(40)
    path = write(tmp_path / "bench.jsonl", [wrap(row["prompt"]) for row in [*clean(20, seed=5), rows[30]]])
    leak = found(rows, tmp_path, f"audit.against=[{{path: {path}}}]")["leakage"]
    assert leak["examples"] == at(tmp_path, 31) and leak["details"]["benchmark"] == 1


def test_what_eval_fraction_holds_out_leaks_through_prompts_that_are_nearly_the_same(tmp_path: Path):
    rows = clean(200)
    rows += [{**row, "prompt": row["prompt"].replace("as well", "too"), "chosen": answer(random.Random(i))}
             for i, row in enumerate(rows[:40])]
    leak = found(rows, tmp_path, "data.eval_fraction=0.3", model_path=model(tmp_path))["leakage"]
    assert 5 <= leak["count"] <= 40 and leak["details"]["same"] == 0


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------- what the judges said


def test_ties_both_bad_and_split_votes_are_found_where_annotators_are_known(tmp_path: Path):
    def annotated(row: Row, *labels: str) -> Row:
        return {"prompt": row["prompt"], "response_1": row["chosen"], "response_2": row["rejected"],
                "preference.responses": list(labels), "preference.responses.users": ["ann", "ben", "cho"][:len(labels)]}

    r = random.Random(0)
    rows = [annotated(row, *[r.choice(["response_1", "response_2"])] * 3) for row in clean(200)]
    assert found(rows, tmp_path) == {}
    more = clean(4, seed=3)
    rows += [annotated(more[0], "tie", "tie", "tie"), annotated(more[1], "both bad", "both bad", "both bad"),
             annotated(more[2], "response_1", "response_2", "response_1")]
    seen = found(rows, tmp_path)
    assert {kind: entry["examples"] for kind, entry in seen.items()} == {
        "tie": at(tmp_path, 201), "both_bad": at(tmp_path, 202), "annotator_disagreement": at(tmp_path, 203)}


def test_equal_ratings_are_ties_and_a_pair_of_equal_scores_is_trained_on(tmp_path: Path):
    rows = clean(50)
    rows[8] |= {"score_chosen": 4.0, "score_rejected": 4.0}
    tie = found(rows, tmp_path)["tie"]
    assert tie["examples"] == at(tmp_path, 9) and tie["details"] == {
        "as_preferences": 1, "left_out": 0, "as_ties": 0}
    rated = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "ratings": [i % 3, 1]}
             for i, row in enumerate(clean(90))]
    assert found(rated, tmp_path)["tie"]["count"] == 30


def test_the_place_that_wins_is_a_bias_unless_the_answers_were_sorted(tmp_path: Path):
    def helpsteer(row: Row, first_wins: bool) -> Row:
        answers = (row["chosen"], row["rejected"]) if first_wins else (row["rejected"], row["chosen"])
        return {"context": [{"role": "user", "content": row["prompt"]}], "response1": answers[0],
                "response2": answers[1], "overall_preference": -1 if first_wins else 1}

    rows = clean(300)
    fair, unfair = ([helpsteer(row, random.Random(i).random() < p) for i, row in enumerate(rows)] for p in (0.5, 0.8))
    assert found(fair, tmp_path) == {}
    seen = found(unfair, tmp_path)
    assert seen.keys() == {"position_bias"} and seen["position_bias"]["severity"] == "warning"
    assert seen["position_bias"]["details"]["first_is_chosen"]["low"] > 0.6
    best_first = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "ratings": [5, 2]}
                  for row in rows]
    assert found(best_first, tmp_path)["position_bias"]["severity"] == "info"


# ------------------------------------------------------------------------------------------------- how answers are told


def test_the_same_answers_up_to_case_and_space_are_found_and_those_that_are_refused(tmp_path: Path):
    rows = clean(60)
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[9]["rejected"] = rows[9]["chosen"].replace(". ", ".\n\n").upper()
    same = found(rows, tmp_path)["identical_completions"]
    assert set(same["examples"]) == set(at(tmp_path, 5, 10))
    assert same["details"] == {"refused": 1, "trained_on": 1}


def test_length_and_style_that_tell_the_sides_apart_are_biases_with_shown_weights(tmp_path: Path):
    def with_longer_chosen(row: Row, i: int) -> Row:
        by_length = sorted((row["chosen"], row["rejected"]), key=len)
        return {**row, "chosen": by_length[i % 4 > 0], "rejected": by_length[i % 4 == 0]}

    seen = found([with_longer_chosen(row, i) for i, row in enumerate(clean(400))], tmp_path)
    assert seen.keys() == {"length_bias"} and seen["length_bias"]["severity"] == "warning"
    assert seen["length_bias"]["details"]["longer_chosen"]["value"] == pytest.approx(0.75, abs=0.02)
    assert 0.55 < seen["length_bias"]["details"]["auc"]["low"] < seen["length_bias"]["details"]["auc"]["high"] < 1
    listed = [{**row, "chosen": "- " + row["chosen"].replace(". ", ".\n- ")} if i % 5 == 0 else row
              for i, row in enumerate(clean(400))]
    style = found(listed, tmp_path)["style_bias"]
    assert style["severity"] == "warning" and style["details"]["features"][0]["feature"] == "bullets"
    assert next(iter(style["details"]["weights"])) == "bullets" and style["details"]["weights"]["bullets"] > 0.5
    opened = [{**row, "rejected": "Beloved friend, " + row["rejected"]} if i % 5 == 0 else row
              for i, row in enumerate(clean(400))]
    style = found(opened, tmp_path)["style_bias"]
    assert style["details"]["weights"]["begins with 'beloved friend'"] < -0.5


def test_a_style_that_both_sides_have_alike_is_none(tmp_path: Path):
    r = random.Random(4)
    rows = [{**row, **{side: f"Sure! **Note:** {row[side]}" for side in ("chosen", "rejected") if r.random() < 0.4}}
            for row in clean(600)]
    assert all(entry["severity"] == "info" for entry in found(rows, tmp_path).values())


GERMAN = ("Das hängt davon ab, wie viel Zeit Sie dafür haben. Am besten fangen Sie mit dem einfachsten Teil an, und "
          "danach sprechen wir über die Kosten.")
CHINESE = "这取决于你有多少时间来做这件事。最好从最简单的部分开始。"


def test_pairs_in_two_languages_and_the_few_in_another_are_found(tmp_path: Path):
    rows = clean(200)
    rows[3]["rejected"] = GERMAN
    rows[5] |= {"chosen": CHINESE, "rejected": CHINESE + "大多数人一开始都会犯同样的错误。"}
    rows[9] |= {"prompt": "Wie kann ich das alte Fahrrad reparieren, wenn ich kein Werkzeug habe und es auch nicht "
                "regnen soll?", "chosen": GERMAN, "rejected": GERMAN + " Ich würde zuerst einen Plan zeichnen."}
    rows[11] |= {"prompt": "Translate this sentence to German for me, please, and tell me what you think of it.",
                 "chosen": GERMAN, "rejected": GERMAN + " Das ist alles, was ich sagen kann."}
    seen = found(rows, tmp_path)
    assert seen.keys() == {"language_mix"} and seen["language_mix"]["examples"] == at(tmp_path, 4, 6, 10)


def test_code_names_and_made_up_words_have_no_language():
    for text in ("for i in range(10): print(i)", "zorblat kim wefo dalun " * 20, "Anna Müller, José García, Li Wei",
                 "| a | b |\n|---|---|\n| 1 | 2 |", "42", ""):
        assert language_of(text) == "", text
    assert (language_of(GERMAN), language_of(CHINESE), language_of(answer(random.Random(0)))) == ("de", "zh", "en")


def test_control_tokens_and_empty_reasoning_are_found_wherever_they_stand(tmp_path: Path):
    rows = clean(100)
    rows[1]["prompt"] += " <|im_end|>"
    rows[2]["chosen"] = "So <|eot|> it goes."                        # special in this tokenizer alone
    rows[3]["rejected"] += "</s>"
    rows[6]["chosen"] = "<think>\n\n</think>\n\n" + rows[6]["chosen"]
    rows[8]["chosen"] = "<think>Let me see.</think>" + rows[8]["chosen"]
    seen = found(rows, tmp_path, model_path=model(tmp_path))
    assert seen["special_tokens_in_text"]["examples"] == at(tmp_path, 2, 3, 4)
    assert seen["empty_reasoning"]["examples"] == at(tmp_path, 7)
    chat = [{"prompt": [{"role": "user", "content": row["prompt"]}],
             "chosen": [{"role": "assistant", "content": row["chosen"], "reasoning_content": "" if i == 5 else "Hm."}],
             "rejected": [{"role": "assistant", "content": row["rejected"], "reasoning_content": "Hm."}]}
            for i, row in enumerate(clean(20))]
    assert found(chat, tmp_path)["empty_reasoning"]["examples"] == at(tmp_path, 6)


# --------------------------------------------------------------------------------------------------------- tokens


def test_pairs_beyond_max_length_are_counted_whatever_is_done_with_them(tmp_path: Path):
    rows = clean(80)
    rows[5]["chosen"] += " and so on" * 2000
    for how in ("drop", "keep_start", "error"):
        loss = found(rows, tmp_path, "data.max_length=2000", f"data.truncation={how}",
                     model_path=model(tmp_path))["truncation_loss"]
        assert (loss["count"], loss["examples"]) == (1, at(tmp_path, 6))


@pytest.mark.parametrize("template, fault", [
    ("{{ bos_token }}" + LLAMA3, "double BOS"),
    (CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>"), "double end"),
    (CHATML.replace("<|im_end|>\\n", "\\n"), "no end of turn"),
    (CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'"), "the template cannot be used")])
def test_a_template_that_is_wrong_is_an_error_for_all_rows(template: str, fault: str, tmp_path: Path):
    broken = tmp_path / "broken"
    bpe(template).save_pretrained(broken)
    seen = found(clean(30), tmp_path, model_path=broken)["template_fault"]
    assert (seen["severity"], seen["count"]) == ("error", 30) and seen["details"]["faults"] == {fault: 30}


def test_texts_that_are_rendered_already_are_told_and_no_error_as_they_are_never_trained_on(tmp_path: Path):
    rows = [{**row, "prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"}
            for row in clean(20)]
    seen = found(rows, tmp_path, model_path=model(tmp_path))
    assert seen["template_fault"]["details"]["faults"] == {"rendered already": 20}
    assert {seen[kind]["severity"] for kind in ("template_fault", "special_tokens_in_text")} == {"warning"}
    assert "template_fault" not in found(rows, tmp_path, "data.chat_template=none", model_path=model(tmp_path))


def test_token_rows_with_a_double_beginning_or_no_end_are_faults(tmp_path: Path):
    r, folder = random.Random(0), model(tmp_path)
    bos, eos = 0, 1

    def ids() -> list[int]:
        return [r.randrange(20, 300) for _ in range(r.randint(5, 30))]

    rows = [{"prompt_ids": [bos, *ids()], "chosen_ids": [*ids(), eos], "rejected_ids": [*ids(), eos]}
            for _ in range(100)]
    assert found(rows, tmp_path, model_path=folder) == {}
    rows[3]["prompt_ids"].insert(0, bos)
    rows[5]["chosen_ids"].append(eos)
    rows[7]["rejected_ids"].pop()
    seen = found(rows, tmp_path, model_path=folder)["template_fault"]
    assert seen["severity"] == "warning"
    assert seen["details"]["faults"] == {"double BOS": 1, "double end": 1, "no end of turn": 1}
    assert set(seen["examples"]) == set(at(tmp_path, 4, 6, 8))


def test_token_rows_without_a_tokenizer_are_audited_as_far_as_they_go(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", 60, longest=60)
    rows += [rows[4], {**rows[6], "chosen_ids": rows[6]["rejected_ids"], "rejected_ids": rows[6]["chosen_ids"]}]
    seen = found(rows, tmp_path, "data.max_length=100")
    assert seen["duplicate_pair"]["examples"] == at(tmp_path, 61)
    assert seen["contradiction"]["examples"] == at(tmp_path, 62)
    long = [i + 1 for i, row in enumerate(rows)
            if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) > 100]
    assert seen["truncation_loss"]["examples"] == at(tmp_path, *long)


# ------------------------------------------------------------------------------------------------------- the set, rules


def test_a_data_set_that_another_outweighs_is_told_and_its_weight_counts(tmp_path: Path):
    large, small = write(tmp_path / "large.jsonl", clean(300)), write(tmp_path / "small.jsonl", clean(12, seed=8))

    def imbalance(weight: float) -> str | None:
        seen = report(tmp_path, f"data.train=[{{path: {large}}}, {{path: {small}, weight: {weight}}}]")["by_kind"]
        return seen["source_imbalance"]["severity"] if "source_imbalance" in seen else None

    assert [imbalance(weight) for weight in (1.0, 5.0, 20.0)] == ["warning", "info", None]


def test_bad_rows_are_named_and_the_audit_goes_on(tmp_path: Path):
    said = report(tmp_path, f"data.train={write(tmp_path / 'rows.jsonl', [*clean(5), {'prompt': 'x'}, *clean(5, 1)])}")
    assert said["pairs"] == 10 and said["rows"] == 11
    assert said["bad_rows"] == {"chosen is missing": {"count": 1, "examples": [
        f"{tmp_path / 'rows.jsonl'}:6: chosen is missing (fields: prompt)"]}}


def test_every_kind_says_what_it_means_and_names_a_key_or_an_act():
    for kind, known in KINDS.items():
        said = finding(kind, 1, 2, ["a:1"])
        assert isinstance(said, Finding) and said.share == 0.5 and known.meaning.endswith(".") and known.remedy
    assert reaches("error", "warning") and reaches("warning", "warning") and not reaches("info", "warning")
    assert not reaches("warning", "error") and not reaches("error", "none")


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "hh_harmless_test.jsonl.gz"])
def test_planted_repetitions_are_found_in_real_sets(name: str, tmp_path: Path):
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip("needs the real sets (DPO_DIST_SHARED)")
    if path.suffix == ".gz":
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()[:250]]
    else:
        rows = json.loads(path.read_text())[:250]
    before = found(rows, tmp_path).get("duplicate_pair", {"count": 0})["count"]
    flipped = {**rows[9], "chosen": rows[9]["rejected"], "rejected": rows[9]["chosen"]}
    seen = found([*rows, rows[5], rows[60], flipped], tmp_path)
    assert seen["duplicate_pair"]["count"] == before + 2 and seen["contradiction"]["examples"] == at(tmp_path, 253)
