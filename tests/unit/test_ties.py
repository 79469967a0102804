"""Pairs of which neither answer is better: how files say so, that they are counted and left out or kept, and how far a
kept one reaches."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from row_files import PLAIN, assistant, read, user, write_lines
from test_judgments import ROWS
from test_parts import TEMPLATE, assert_same
from test_store import build, byte_tokenizer, config, row

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import DatasetConfig, LossConfig
from dpo_dist.data.formats.ties import tie_label
from dpo_dist.data.pack import pack_pairs
from dpo_dist.data.prepare import prepare
from dpo_dist.data.rows import read_rows
from dpo_dist.data.summary import summary_lines
from dpo_dist.logps import pair_logps
from dpo_dist.losses import preference_loss
from dpo_dist.run.metrics import MetricSums
from dpo_dist.runtime.world import World
from dpo_dist.types import TokenizedPair, TokenLogps

JUDGED = ("helpsteer", "argilla", "nemo_rl", "distilabel", "ultrafeedback", "ratings", "arena")
NAMES_CHOSEN = [form for form in ROWS if form not in JUDGED]
# rows of the formats whose rows judge: neither answer is better, ...
TIED: dict[str, dict[str, Any]] = {
    "helpsteer": {"overall_preference": 0},
    "argilla": {"preference.responses": ["response_1", "response_2"]},
    "nemo_rl": {"completions": [{"rank": 1, "completion": [assistant(a)]} for a in "ab"]},
    "distilabel": {"ratings": [3, 3]},
    "ultrafeedback": {"completions": [{"response": a, "overall_score": 4} for a in "ab"]},
    "ratings": {"ratings": [1, 1]},
    "arena": {"winner": "tie"}}
# ... or neither is good
BAD = {"argilla": {"preference.responses": ["both are bad"] * 3 + ["response_1", "response_2"]},
       "arena": {"winner": "tie (bothbad)"}}


def kept(tmp_path: Path, *rows: dict[str, Any], ties: str = "keep", form: str = "auto") -> Any:
    """(rows, report) of reading, with ties as asked."""
    path = write_lines(tmp_path / "ties.jsonl", *rows)
    stream, report = read_rows(DatasetConfig(str(path), form), "error", ties)            # type: ignore[arg-type]
    return list(stream), report


@pytest.mark.parametrize("form", TIED)
def test_formats_that_judge_give_ties_as_two_answers_or_count_them(form: str, tmp_path: Path):
    for said, kind in ((TIED[form], "tie"), *(((BAD[form], "both_bad"),) if form in BAD else ())):
        record = {**ROWS[form], **said}
        none, dropped = kept(tmp_path, record, ties="drop", form=form)
        assert (none, dropped.ties, dropped.both_bad, dropped.pairs, dropped.kept_ties) == (
            [], 1, kind == "both_bad", 0, 0)
        (got,), report = kept(tmp_path, record, form=form)
        assert (got.tie, got.strength, report.pairs, report.ties, report.kept_ties) == (kind, 0.0, 1, 1, 1)
        texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in (got.chosen, got.rejected)]
        assert texts == ["a", "b"], "as they stand in the file"


@pytest.mark.parametrize("form", NAMES_CHOSEN)
@pytest.mark.parametrize(("said", "kind"), [({"tie": True}, "tie"), ({"both_bad": 1}, "both_bad"),
                                            ({"preference": "Both bad"}, "both_bad"), ({"winner": "tie"}, "tie")])
def test_rows_that_name_chosen_and_rejected_may_say_that_neither_is_better(form: str, said: dict, kind: str,
                                                                            tmp_path: Path):
    rows, report = kept(tmp_path, {**ROWS[form], **said}, form=form)
    assert [r.tie for r in rows] == [kind] and (report.ties, report.both_bad) == (1, kind == "both_bad")
    rows, report = kept(tmp_path, {**ROWS[form], **said}, ties="drop", form=form)
    assert (rows, report.ties, report.pairs) == ([], 1, 0)


@pytest.mark.parametrize(("label", "kind"), [
    ("tie", "tie"), ("Tie", "tie"), ("it's a tie", "tie"), ("neither", "tie"), ("no preference", "tie"),
    ("equal", "tie"), ("About the same", "tie"), ("both good", "tie"), ("draw", "tie"), ("both bad", "both_bad"),
    ("both_bad", "both_bad"),
    ("tie (bothbad)", "both_bad"), ("Both are bad", "both_bad"), ("neither is good", "both_bad"),
    ("none acceptable", "both_bad"), ("chosen", None), ("A", None), ("bad", None), ("both", None), ("none", None),
    ("tied up in court", None), ("", None), (0, None), (None, None), (["tie"], None)])
def test_labels_are_ties_only_where_they_say_nothing_else(label: Any, kind: str | None):
    assert tie_label(label) == kind


def test_false_flags_and_other_labels_leave_a_row_a_preference(tmp_path: Path):
    (got,), report = kept(tmp_path, {**PLAIN, "tie": False, "both_bad": "false", "preference": "chosen", "label": "x"})
    assert got.tie is None and report.ties == 0
    assert got.record == {"columns": {"preference": "chosen", "label": "x"}}


def test_a_column_called_tie_that_is_none_is_a_bad_row_that_says_how_to_map_it_away(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", {**PLAIN, "tie": "silk"})
    with pytest.raises(UserError, match=r"tie is neither true nor false.*columns: \{tie: null\}"):
        read(path)
    assert len(read(path, columns={"tie": None})[0]) == 1


def test_ties_of_identical_answers_are_counted_and_no_mistake(tmp_path: Path):
    same = {"conversation_a": [user("q"), assistant("a")], "conversation_b": [user("q"), assistant("a")]}
    for said in ({"prompt": "q", "responses": ["a", "a"], "ratings": [1, 1]}, {**same, "winner": "tie"},
                 {**PLAIN, "chosen": "a", "rejected": "a", "tie": True}):
        rows, report = kept(tmp_path, said)
        assert (rows, report.bad.counts, report.no_pair) == ([], {}, {"a tie of identical answers": 1})
        assert kept(tmp_path, said, ties="drop")[1].ties == 1


def test_arena_rows_name_the_winner_the_models_the_judge_and_the_language(tmp_path: Path):
    battle = {"question_id": "x1", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_3",
              "conversation_a": [user("q"), assistant("a"), user("r"), assistant("b")],
              "conversation_b": [user("q"), assistant("c"), user("r"), assistant("d")], "turn": 2, "anony": True,
              "language": "English", "tstamp": 1.5, "openai_moderation": {"flagged": False}}
    (got,), report = kept(tmp_path, battle)
    assert report.format == "arena" and got.prompt == (user("q"),)
    assert got.chosen == (assistant("c"), user("r"), assistant("d"))
    assert got.record == {"chosen_model": "n", "rejected_model": "m", "annotator": "arena_user_3", "locale": "English",
                          "columns": {"question_id": "x1", "turn": 2, "anony": True, "tstamp": 1.5,
                                      "openai_moderation.flagged": False}}


def test_arena_rows_of_texts_that_stand_as_lists(tmp_path: Path):
    battle = {"id": 5, "model_a": "m", "model_b": "n", "prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]',
              "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    (got,), _ = kept(tmp_path, battle)
    assert (got.prompt, got.chosen, got.record["chosen_model"]) == ((user("q"),), (assistant("a"),), "m")
    (tie,), _ = kept(tmp_path, {**battle, "winner_model_a": 0, "winner_tie": 1})
    assert tie.tie == "tie"
    with pytest.raises(UserError, match="not one of winner_model_a"):
        kept(tmp_path, {**battle, "winner_model_a": 0}, form="arena")
    with pytest.raises(UserError, match="winner is neither model_a"):
        kept(tmp_path, {**battle, "winner": "me"}, form="arena")


# ---------------------------------------------------------------------------------------------------------- the store


def some(n: int = 40) -> list[dict]:
    return [row([1, i], [2], [3], **({"tie": True} if i % 5 == 0 else {"both_bad": True} if i % 7 == 0 else {}))
            for i in range(n)]


def test_kept_ties_come_out_of_the_store_as_they_went_in_and_parts_write_the_same(tmp_path: Path):
    data = DatasetConfig(str(write_lines(tmp_path / "rows.jsonl", *some())))
    assert_same(config(tmp_path, data, ties="keep"), tmp_path)
    store = build(tmp_path, some(), ties="keep")
    kinds = ["tie" if i % 5 == 0 else "both_bad" if i % 7 == 0 else None for i in range(40)]
    assert [store[i].tie for i in range(40)] == kinds == store.facts("tie")
    assert [store[i].strength for i in range(3)] == [0.0, None, None]
    dropped = build(tmp_path, some())
    assert len(dropped) == kinds.count(None) and not dropped.tie.any()
    assert "12 ties (4 both bad) left out" in "\n".join(summary_lines(dropped, "train"))
    assert "12 ties (4 both bad) kept" in "\n".join(summary_lines(store, "train"))


def test_the_digest_knows_ties_and_is_what_it_was_where_there_are_none(tmp_path: Path):
    plain = [row([1, i], [2], [3]) for i in range(20)]
    drop, keep = build(tmp_path, plain), build(tmp_path, plain, ties="keep")
    assert drop.digest == keep.digest and drop.path != keep.path
    one = [{**item, **({"tie": True, "strength": 1} if i == 7 else {})} for i, item in enumerate(plain)]
    two = [{**item, **({"both_bad": True} if i == 7 else {})} for i, item in enumerate(plain)]
    digests = {build(tmp_path, rows, ties="keep").digest for rows in (plain, one, two)}
    assert len(digests) == 3
    assert prepare(config(tmp_path, DatasetConfig(str(tmp_path / "rows.jsonl"))), None, None)[0].digest != drop.digest


def test_ties_of_text_rows_pass_through_the_tokenizer(tmp_path: Path):
    data = DatasetConfig(str(write_lines(tmp_path / "rows.jsonl", {**ROWS["ratings"], "ratings": [1, 1]})))
    store = prepare(config(tmp_path, data, ties="keep"), byte_tokenizer(TEMPLATE), "d")[0]
    assert store[0].tie == "tie" and store.tie.dtype == np.uint8


# ------------------------------------------------------------------------------------------- packs, losses and metrics


PAIRS = [TokenizedPair((5, 6), (7, 8, 1), (9, 1), "a", tie="tie"), TokenizedPair((5, 6, 7), (4, 1), (9, 9, 1), "b"),
         TokenizedPair((5,), (4, 1), (9, 1), "c", tie="both_bad")]


def test_a_pack_says_which_pairs_are_ties_and_the_pairs_log_probs_say_it_too():
    batch = pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    assert batch.tie is not None and batch.tie.tolist() == [1, 0, 2] and batch.tie.dtype == torch.uint8
    assert batch.to(torch.device("cpu")).tie is not None
    logps = pair_logps(batch, TokenLogps(torch.zeros(len(batch.targets))), None, LossConfig("sft"), 1.0)
    assert logps.tie is not None and logps.tie.tolist() == [1, 0, 2]


def test_metrics_of_chosen_and_rejected_leave_ties_out_and_the_loss_does_not(world: World):
    batch = pack_pairs(PAIRS, [0, 1, 2], [1.0, 3.0, 2.0])
    torch.manual_seed(0)
    policy, reference = -torch.rand(len(batch.targets)) * 3, -torch.rand(len(batch.targets)) * 3
    loss = resolve_loss(LossConfig("rao_kupper"))
    pairs = pair_logps(batch, TokenLogps(policy), reference, loss, 2.5)
    per_pair = preference_loss(pairs, loss)
    whole, alone = MetricSums(loss, world.device), MetricSums(loss, world.device)
    whole.add(pairs, per_pair, batch.weight.double())
    alone.add(pairs, per_pair, batch.weight.double() * torch.tensor([0, 1, 0]))
    means, of_the_clear_pair = whole.means(world), alone.means(world)
    assert means["rewards/accuracies"] in (0.0, 1.0)
    for name, value in means.items():
        if name in ("loss", "reference/kl_per_token"):
            of_all = per_pair if name == "loss" else pairs.kl_per_token
            assert of_all is not None
            assert value == pytest.approx(((of_all[0] + 3 * of_all[1] + 2 * of_all[2]) / 6).item())
        else:
            assert value == of_the_clear_pair[name]
    ties = MetricSums(loss, world.device)
    ties.add(pairs, per_pair, batch.weight.double() * torch.tensor([1, 0, 1]))
    assert set(ties.means(world)) == {"loss", "reference/kl_per_token"}


def test_sums_of_a_checkpoint_from_before_ties_go_on(world: World):
    loss = resolve_loss(LossConfig("sigmoid"))
    earlier = [2.0] * 9 + [4.0]
    assert MetricSums(loss, world.device, earlier).means(world)["rewards/accuracies"] == 0.5


# --------------------------------------------------------------------------------------------------------- the config


def configured(*words: str) -> Any:
    return compose(["model.path=m", "data.train=rows.jsonl", *words])


def test_keeping_ties_needs_a_loss_that_knows_them():
    for words in ((), ("loss=rpo",), ("loss.name=mixture", "loss.terms={rao_kupper: 1.0, sft: 1.0}")):
        with pytest.raises(UserError, match=r"data.ties=keep, but loss.name=.* has no likelihood for ties.*"
                                            r"loss=rao_kupper or loss=davidson, or data.ties=drop"):
            configured("data.ties=keep", *words)
    assert configured("data.ties=keep", "loss=davidson").loss.tie_nu == 1.0
    assert configured("loss=rao_kupper").loss.tie_nu == 3.0, "without ties it is a loss like others"


def test_a_threshold_below_one_is_refused_and_one_where_ties_are_kept():
    with pytest.raises(UserError, match=r"loss.tie_nu=0.5 must be at least 1 for loss 'rao_kupper'"):
        configured("loss=rao_kupper", "loss.tie_nu=0.5")
    with pytest.raises(UserError, match=r"data.ties=keep, but loss.tie_nu=1 says that there are no ties"):
        configured("loss=rao_kupper", "loss.tie_nu=1", "data.ties=keep")
    with pytest.raises(UserError, match=r"loss.tie_nu=2.0 is not used by loss 'sigmoid'"):
        configured("loss.tie_nu=2")
    assert configured("loss=davidson", "loss.tie_nu=0.1", "data.ties=keep").loss.tie_nu == 0.1


def test_runs_from_before_these_keys_are_found_again():
    said = configured("data.ties=keep", "loss=davidson").identity_dict()
    assert said["data"]["ties"] == "keep" and said["loss"]["tie_nu"] == 1.0
    plain = configured().identity_dict()
    assert "ties" not in plain["data"] and "tie_nu" not in plain["loss"]
    assert "pairs_per_prompt" not in plain["data"]["train"][0]
