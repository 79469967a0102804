"""What the guards see: displacement early and never in a sound run; answers that grow or repeat beyond their scatter.
"""
from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.run.generations import figures, write_generations
from dpo_dist.run.guard import (
    FALL_BOUND,
    Finding,
    Level,
    displacement,
    growth,
    held_out_displacement,
    paired_interval,
    repeating,
    repetition,
)
from dpo_dist.run.guard_log import ASKS, Facts, Guard, check_not_stopped, read_events, remedy
from dpo_dist.runtime.run_dir import RunDir

MODEL = ["model.path=m", "data.train=rows.jsonl", "data.eval=held_out.jsonl"]


def first_found(chosen: Any, margins: Any = None) -> Finding | None:
    """The first finding of a run of these rows, from step 1 on; margins rise where none are given."""
    rows: list[Level] = []
    for step, value in enumerate(chosen, 1):
        rows.append(Level(step, float(value), 0.1 * step if margins is None else float(margins[step - 1])))
        if found := displacement(rows, start_margin=0.0):
            return found
    return None


# -------------------------------------------------------------------------------------------------------- displacement


def test_a_steep_fall_is_told_from_its_first_row_and_a_slow_one_once_enough_rows_agree():
    steep = first_found([0, 0, 0, -0.1, -0.8, -3, -6])
    assert steep.step == 5 and steep.value == -0.8 and "0.80 nats a token less likely" in steep.what
    slow = first_found(np.linspace(0, -1, 201))
    assert -0.35 < slow.value < -FALL_BOUND and 50 < slow.step < 75


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_in_noise_is_told_before_half_of_it(seed: int):
    r = np.random.default_rng(seed)
    fall = -4 / (1 + np.exp(-(np.arange(100) - 40) / 8))          # as after a warm-up
    found = first_found(fall * r.normal(1, 0.3, 100))
    assert found is not None and -2 < fall[found.step - 1] < -0.2


@pytest.mark.parametrize("level, noise", [(0.3, 0.1), (0.0, 0.15), (-0.1, 0.1), (-0.15, 0.05), (0.0, 0.3)])
def test_a_sound_run_is_silent_for_a_thousand_rows_however_its_rows_scatter(level: float, noise: float):
    r = np.random.default_rng(7)
    rise = 1 - np.exp(-np.arange(1000) / 50)
    assert first_found(level * rise + noise * rise * r.normal(size=1000)) is None


def test_one_outlier_is_no_fall_and_where_rows_scatter_not_even_a_larger_one():
    r = np.random.default_rng(3)
    rise = np.minimum(np.arange(60) / 10, 1)
    noisy, quiet = rise * r.normal(0, 0.2, 60), rise * r.normal(0, 0.01, 60)
    assert first_found([*quiet, -0.4, *quiet[-3:]]) is None and first_found([*noisy, -0.7, *noisy[-3:]]) is None
    assert first_found([*quiet, -0.7]).step == 61


def test_a_chosen_answer_that_rose_and_falls_back_is_no_displacement():
    assert first_found([*np.linspace(0, 1.5, 30), *np.linspace(1.5, 0, 30)]) is None


def test_a_fall_without_rising_margins_is_told_as_early_and_called_another_name():
    falling = np.linspace(0, -2, 101)
    displaced, diverged = first_found(falling), first_found(falling, margins=-np.ones(101))
    assert displaced.step == diverged.step and "while the margins rise" in displaced.what
    assert "the margins do not rise: the run diverges" in diverged.what


def test_rows_that_are_no_numbers_are_no_fall():
    assert first_found([0, float("nan"), float("nan")]) is None


def test_held_out_pairs_are_compared_with_their_own_first_evaluation():
    before = Level(0, -3.0, 0.5)
    assert held_out_displacement(before, Level(10, -3.2, 1.0)) is None
    found = held_out_displacement(before, Level(20, -3.3, 1.0))
    assert found.step == 20 and found.value == pytest.approx(-0.3) and "on held-out pairs" in found.what
    # learned by heart, and little more: no displacement until it is a collapse
    assert held_out_displacement(before, Level(20, -3.9, 0.4)) is None
    assert "the run diverges" in held_out_displacement(before, Level(20, -4.1, 0.4)).what


# -------------------------------------------------------------------------------------------------- generated answers


def test_answers_that_double_are_told_and_those_that_only_scatter_are_not():
    r = np.random.default_rng(0)
    before = r.integers(50, 150, 32)
    assert growth(10, before, 2 * before).value == 2.0
    assert growth(10, before, r.permutation(before)) is None and growth(10, before, (1.1 * before).astype(int)) is None
    assert growth(10, before[:3], 9 * before[:3]) is None, "three answers say nothing"
    found = growth(10, before, 2 * before)
    assert (found.step, found.guard) == (10, "length") and "2.00 times" in found.what


def test_a_few_answers_that_grow_much_are_within_the_interval():
    before = np.full(16, 100)
    assert growth(1, before, np.where(np.arange(16) < 2, 800, 100)) is None
    assert growth(1, before, np.where(np.arange(16) < 12, 200, 100)) is not None


def test_answers_that_begin_to_repeat_are_told_and_those_that_did_before_are_not():
    loops, plain = ["the same again and again and " * 10] * 8, [" ".join(map(str, range(i, i + 50))) for i in range(8)]
    shares = [[repetition(text) for text in texts] for texts in (plain, loops)]
    found = repeating(5, shares[0], shares[1])
    assert found.guard == "repetition" and found.value > 0.8 and repeating(5, shares[1], shares[1]) is None


@pytest.mark.parametrize("answer, share", [
    ("one two three four", 0.0), ("a b c", 0.0), ("", 0.0), ([], 0.0), ([1, 2, 3, 4, 5, 6], 0.0), ([7] * 13, 0.9),
    ("a b c d a b c d", 0.2), ("x" * 43, 0.975), ("好" * 43, 0.975), ("春眠不觉晓处处闻啼鸟", 0.0),
    ("no no, no no, no no,", 1 / 2)])
def test_repetition_is_the_share_of_4_grams_that_stood_before(answer: str | list[int], share: float):
    assert repetition(answer) == pytest.approx(share)


def test_the_interval_of_a_mean_difference_covers_as_often_as_it_says():
    r = np.random.default_rng(0)
    samples = r.normal(3, 5, (2000, 8))
    held = [low <= 3 <= high for low, high in (paired_interval(np.zeros(8), row) for row in samples)]
    assert 0.94 < np.mean(held) < 0.96


def samples(step: int, tokens: list[int], text: str = "a b c d e f") -> list[dict[str, Any]]:
    return [{"step": step, "prompt": f"p{i}", "completion": text, "tokens": n, "ended": n < 64}
            for i, n in enumerate(tokens)]


def test_generations_json_has_the_figures_before_and_now(tmp_path: Path):
    rows = [*samples(0, [10, 20, 30, 40]), *samples(5, [64] * 4), *samples(10, [20, 40, 60, 64], "loop " * 13)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = write_generations(RunDir(tmp_path))
    assert json.loads((tmp_path / "generations.json").read_text()) == found
    assert found["before"] == {"step": 0, "answers": 4, "tokens_mean": 25.0, "ended_share": 1.0, "repetition": 0.0,
                               "tokens_low": pytest.approx(4.6, abs=0.2), "tokens_high": pytest.approx(45.4, abs=0.2)}
    assert found["after"]["step"] == 10 and found["after"]["ended_share"] == 0.75
    assert found["after"]["repetition"] == pytest.approx(0.9)
    assert write_generations(RunDir(tmp_path), after=5)["after"]["tokens_mean"] == 64
    assert figures(samples(0, [3]))["tokens_low"] is None


# ------------------------------------------------------------------------------------------------------- what it keeps


def row(step: int, chosen: float, margin: float, split: str = "train") -> dict[str, Any]:
    return {"step": step, "split": split, "loss": 0.5, "rewards/margins": margin, "logps/chosen": -100.0 + 20 * chosen,
            "reference/chosen_drift_per_token": chosen}


def guard(folder: Path, *words: str, resumed_step: int = 0) -> Guard:
    facts = Facts(same_start=True, held_out_tokens=20.0, prompts=tuple(f"held_out.jsonl:{i}" for i in range(8)))
    return Guard(configured(*words), RunDir(folder), facts, resumed_step)


@cache
def configured(*words: str) -> RunConfig:
    return compose([*MODEL, *words])


FALLING = [row(step, min(0.0, 0.6 - 0.3 * step), float(step)) for step in range(1, 9)]


def test_a_guard_speaks_once_and_keeps_what_it_said_with_step_pairs_and_remedy(tmp_path: Path):
    watching = guard(tmp_path, "optim.lr=1e-4")
    asked = []
    for one in FALLING:
        watching.log(one)
        asked.append(watching.asks())
    assert asked == [0, 0, 0] + [ASKS] * 5
    messages, stops = watching.tell(lambda found: [("rows.jsonl:3", -0.9)])
    assert not stops and len(messages) == 1 and watching.asks() == 0
    [event] = read_events(RunDir(tmp_path))
    assert {**event, "message": ""} == {"step": 4, "guard": "displacement", "action": "warn", "message": "", "bound":
                                        -0.25, "value": pytest.approx(-0.6), "pairs": ["rows.jsonl:3"]}
    for part in ("step 4: ", "0.60 nats a token", "rows.jsonl:3 (-0.90)", "loss=rpo", "loss=sigmoid_norm",
                 "lower optim.lr (now 0.0001)", "larger loss.beta (now 0.1)"):
        assert part in event["message"] and part in messages[0]
    watching.log(row(9, -5.0, 9.0))
    assert watching.asks() == 0


def test_a_run_that_goes_on_knows_all_again_from_its_files_and_does_not_repeat_itself(tmp_path: Path):
    for resumed, told, asks in ((8, True, 0.0), (8, False, ASKS), (2, True, 0.0)):
        folder = tmp_path / f"{resumed}{told}"
        folder.mkdir()
        first = guard(folder)
        for one in FALLING:
            first.log(one)
        if told:
            first.tell(lambda found: [])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in FALLING[:resumed]))
        again = guard(folder, resumed_step=resumed)
        assert again.asks() == asks and len(read_events(RunDir(folder))) == (told and resumed == 8)
        for one in FALLING[resumed:4]:                     # those after the checkpoint are made again
            again.log(one)
        assert (again.asks() == ASKS) == (resumed == 2 or not told)


def test_a_slow_fall_goes_on_over_a_resume(tmp_path: Path):
    rows = [row(step, -0.35, 1.0) for step in range(1, 20)]
    straight = guard(tmp_path / "none")
    steps = next(i for i, one in enumerate(rows, 1) if straight.log(one) or straight.asks())
    assert steps > 5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows[:steps - 1]))
    again = guard(tmp_path, resumed_step=steps - 1)
    assert not again.asks()
    again.log(rows[steps - 1])
    assert again.asks()


def test_a_guard_that_stopped_a_run_stops_it_again_until_it_only_warns(tmp_path: Path):
    watching = guard(tmp_path, "guard.on_displacement=stop")
    for one in FALLING:
        watching.log(one)
    assert watching.tell(lambda found: [])[1] == ["displacement"]
    run_dir = RunDir(tmp_path)
    with pytest.raises(UserError, match=r"guard\.on_displacement=stop: step 4: .*Go on from the last checkpoint with "
                                        r"guard\.on_displacement=warn; the same command stops again"):
        check_not_stopped(run_dir, watching._config.guard, 8)
    check_not_stopped(run_dir, watching._config.guard, 3)          # those steps are made again
    check_not_stopped(run_dir, configured().guard, 8)


def test_growing_and_repeating_answers_are_told_with_their_prompts(tmp_path: Path):
    watching = guard(tmp_path, "eval.samples=8", "guard.on_length=stop")
    watching.log_samples(0, samples(0, [20] * 8))
    assert not watching.asks()
    watching.log_samples(10, samples(10, [60, 40, 60, 60, 60, 40, 60, 90], "loop " * 40))
    messages, stops = watching.tell(lambda found: [("rows.jsonl:3", -0.9)])
    assert stops == ["length"] and len(messages) == 2 and "rows.jsonl" not in "".join(messages)
    events = {event["guard"]: event for event in read_events(RunDir(tmp_path))}
    assert events["length"]["pairs"][0] == "held_out.jsonl:7" and events["length"]["action"] == "stop"
    assert events["repetition"]["value"] > 0.9 and events["repetition"]["action"] == "warn"


def test_a_guard_that_is_off_says_nothing(tmp_path: Path):
    watching = guard(tmp_path, "guard.on_displacement=off")
    for one in FALLING:
        watching.log(one)
    assert not watching.asks()


def test_without_a_reference_that_stands_still_held_out_log_probs_are_followed(tmp_path: Path):
    for words in (["loss=simpo"], ["reference.sync.mode=hard", "reference.sync.every_steps=8", "reference.mode=live"]):
        watching = guard(tmp_path / words[0], *words)
        for step, fall in ((0, 0.0), (10, -0.2), (20, -0.4)):
            held_out = {**row(step, fall, step / 10, "eval"), "reference/chosen_drift_per_token": 0.0}
            if words == ["loss=simpo"]:
                del held_out["reference/chosen_drift_per_token"]
            watching.log(held_out)
            assert bool(watching.asks()) == (step == 20)


def test_where_policy_and_reference_differ_from_the_start_the_first_rows_are_what_is_fallen_from(tmp_path: Path):
    r = np.random.default_rng(0)
    other = Guard(compose([*MODEL, "reference.path=other"]), RunDir(tmp_path), Facts(False, 20.0), 0)
    for step in range(1, 400):
        other.log(row(step, -2 + r.normal(0, 0.2), 0.5 + step / 100))
        assert not other.asks()
    for step in range(400, 430):
        other.log(row(step, -2.6 + r.normal(0, 0.2), 5.0))
    assert other.asks()


def test_sft_has_nothing_to_guard(tmp_path: Path):
    watching = guard(tmp_path, "loss=sft")
    watching.log({"step": 1, "split": "train", "loss": 3.0, "logps/chosen": -100.0})
    assert not watching.asks()


@pytest.mark.parametrize("words, parts, left_out", [
    (["loss=rpo"], ["more weight of sft in loss.terms", "loss=sigmoid_norm"], ["loss=rpo"]),
    (["loss=sigmoid_norm"], ["loss=rpo", "a larger loss.beta (now 5)"], ["loss=sigmoid_norm"]),
    (["loss=simpo"], ["loss=rpo", "a larger loss.beta (now 2)"], ["loss=sigmoid_norm"]),
    (["loss=orpo"], ["lower optim.lr"], ["loss.beta", "loss=sigmoid_norm"])])
def test_a_remedy_is_something_that_the_run_does_not_do_yet(words: list[str], parts: list[str], left_out: list[str]):
    said = remedy(compose([*MODEL, *words]), "displacement")
    assert all(part in said for part in parts) and not any(part in said for part in left_out)


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("words, said", [
    (["guard.on_length=stop"], "guard.on_length=stop has too little to look at: eval.samples=0; set eval.samples=32"),
    (["guard.on_repetition=stop", "eval.samples=3"], "too little to look at: eval.samples=3"),
    (["guard.on_displacement=stop", "loss=sft"], "nothing to look at with loss.name=sft: it has no rewards"),
    (["guard.on_displacement=stop", "loss=simpo", "data.eval=[]"], "there are none; set data.eval"),
    (["guard.on_length=yes"], "one of: off, stop, warn"),
    (["eval.judge.command=[judge]"], "eval.judge.command would do nothing: eval.samples=0"),
    (["eval.judge.url=localhost:80", "eval.samples=8"], "must start with http:// or https://"),
    (["eval.judge.command=[]", "eval.samples=8"], "names no program"),
    (["eval.judge.command=[judge]", "eval.judge.url=http://localhost", "eval.samples=8"], "are both set"),
    (["eval.judge.against=chosen"], "eval.judge.against=chosen would do nothing: there is no judge"),
])
def test_what_would_do_nothing_is_an_error(words: list[str], said: str):
    with pytest.raises(UserError) as refused:
        compose([*MODEL, *words])
    assert said in str(refused.value)


def test_guards_and_judge_change_no_runs_identity_and_off_may_be_written_as_yaml_reads_it():
    plain = configured()
    other = compose([*MODEL, "guard.on_displacement=off", "guard.on_length=false", "eval.samples=8",
                     "eval.judge.command=[python,judge.py,--all]"])
    assert other.identity() == plain.identity()
    assert (other.guard.on_displacement, other.guard.on_length) == ("off", "off")
    assert other.eval.judge.command == ("python", "judge.py", "--all")
