"""A run made to displace is warned early, or stopped with all kept; a sound one hears nothing. And a judge is asked in
the end, whose faults cost no results."""
from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, metrics, train_on, write_tiny_llama

pytestmark = pytest.mark.distributed

DRIFT = "reference/chosen_drift_per_token"
SOUND_LR, STEPS = 1e-3, 40
TOO_HIGH = f"optim.lr={20 * SOUND_LR}"


def write_alike(path: Path, n: int, seed: int) -> None:
    """Pairs whose completions differ in one token: what makes a policy unlearn chosen ones too (arXiv 2410.08847)."""
    r = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [r.randrange(8, 64) for _ in range(r.randint(low, high))]

    bodies = [(ids(2, 12), ids(3, 12)) for _ in range(n)]
    path.write_text("".join(json.dumps({"prompt_ids": prompt, "chosen_ids": [*body, 3, 1],
                                        "rejected_ids": [*body, 4, 1]}) + "\n" for prompt, body in bodies))


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_alike(tmp_path / "rows.jsonl", 16 * STEPS, 0)
    write_alike(tmp_path / "held_out.jsonl", 16, 1)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=16", f"run.dir={tmp_path / 'run'}"]


def events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "guard.jsonl").read_text().splitlines()]


def test_a_run_made_to_displace_is_warned_before_half_of_its_fall_and_once(tmp_path: Path, words: list[str]):
    done = dpo_dist(*words, "zero=none", TOO_HIGH)
    [event] = events(tmp_path / "run")
    rows = metrics(tmp_path / "run")
    total = max(-row[DRIFT] for row in rows)
    at_warning = max(-row[DRIFT] for row in rows if row["step"] <= event["step"])
    assert total > 2 and at_warning < total / 4 and event["step"] < STEPS / 3
    assert event["guard"] == "displacement" and event["action"] == "warn" and event["value"] < event["bound"]
    assert rows[int(event["step"]) - 1]["rewards/margins"] > 0
    assert len(event["pairs"]) == 5 and all(f"{tmp_path / 'rows.jsonl'}:" in where for where in event["pairs"])
    for part in ("while the margins rise", "Most fallen pairs: ", "loss=rpo", "lower optim.lr (now 0.02)"):
        assert part in event["message"]
    warning = f"guard.on_displacement=warn: {event['message']}"
    assert done.stdout.count(warning) == 1 and done.stdout.index(warning) < done.stdout.index(f"  {STEPS}/{STEPS}")


def test_a_fall_that_only_held_out_pairs_show_names_those(tmp_path: Path, words: list[str]):
    dpo_dist(*words, "zero=none", TOO_HIGH, f"train.log_every_steps={STEPS}", "train.eval_every_steps=10")
    [event] = events(tmp_path / "run")
    assert event["step"] in (10, 20) and "on held-out pairs" in event["message"] and len(event["pairs"]) == 5
    assert all(f"{tmp_path / 'held_out.jsonl'}:" in where for where in event["pairs"])


def test_a_sound_run_hears_nothing_and_neither_does_one_that_is_kept_from_falling(tmp_path: Path, words: list[str]):
    for loss, lr in (("dpo", f"optim.lr={SOUND_LR}"), ("rpo", TOO_HIGH)):
        done = dpo_dist(*words, "zero=none", f"loss={loss}", lr, f"run.dir={tmp_path / loss}")
        assert not (tmp_path / loss / "guard.jsonl").exists() and "guard" not in done.stdout
        assert metrics(tmp_path / loss)[-1]["rewards/margins"] > 0.3


def test_stop_saves_and_ends_all_ranks_and_the_same_command_with_warn_goes_on_without_a_word(tmp_path: Path,
                                                                                            words: list[str]):
    run, two = tmp_path / "run", "cluster.procs_per_node=2"
    stopped = dpo_dist(*words, two, TOO_HIGH, "guard.on_displacement=stop", code=2)
    [event] = events(run)
    [checkpoint] = [path.name for path in (run / "checkpoints").iterdir()]
    assert event["action"] == "stop" and (run / "checkpoints" / checkpoint / "COMPLETE").exists()
    saved = int(checkpoint.removeprefix("step-"))
    assert event["step"] <= saved <= event["step"] + 2 and saved < STEPS / 3
    failure = json.loads((run / "FAILED").read_text())
    assert failure["exit_code"] == 2
    assert f"Step {saved} of {STEPS} is saved. Go on from the last checkpoint" in failure["message"]
    assert stopped.stderr.count("error: ") == 1 and str(event["message"]) in stopped.stderr
    assert "Traceback" not in stopped.stderr and not (run / "model").exists() and not (run / "DONE").exists()

    again = dpo_dist(*words, two, TOO_HIGH, "guard.on_displacement=stop", code=2)
    assert "guard.on_displacement=warn; the same command stops again at once" in again.stderr
    assert max(row["step"] for row in metrics(run)) <= saved

    done = dpo_dist(*words, two, TOO_HIGH)
    assert f"resumed from {checkpoint}" in done.stdout and (run / "DONE").exists() and (run / "model").exists()
    assert events(run) == [event] and "nats a token less likely" not in done.stdout
    assert f"guard.on_displacement at step {event['step']}: see {run / 'guard.jsonl'}" in done.stdout


# ----------------------------------------------------------------------------------------------- generations and judge


JUDGE = """
import json, pathlib, sys
rows = [json.loads(line) for line in sys.stdin]
pathlib.Path({seen!r}).write_text(json.dumps(rows))
if {fails!r}:
    sys.exit("the judge's model is not loaded")
for row in rows:
    print(json.dumps({{"id": row["id"], "score_a": row["a"].count(3), "score_b": row["b"].count(3)}}))
"""


def judged_by(folder: Path, fails: bool) -> str:
    (folder / "judge.py").write_text(JUDGE.format(seen=str(folder / "seen.json"), fails=fails))
    return f"eval.judge.command=[{sys.executable},{folder / 'judge.py'}]"


def test_answers_are_measured_and_judged_in_the_end_and_a_broken_judge_costs_no_results(tmp_path: Path,
                                                                                      words: list[str]):
    run = tmp_path / "run"
    words += ["zero=none", "train.max_steps=12", "eval.samples=12", "eval.max_new_tokens=12", "loss=rpo", TOO_HIGH]
    failed = dpo_dist(*words, judged_by(tmp_path, fails=True), code=2)
    assert "the judge failed, and nothing else" in failed.stderr and "the judge's model is not loaded" in failed.stderr
    assert (run / "model" / "model.safetensors").exists() and "answers to 12 held-out prompts" in failed.stdout
    found = json.loads((run / "generations.json").read_text())
    assert (found["before"]["step"], found["after"]["step"], found["after"]["answers"]) == (0, 12, 12)
    assert found["before"]["tokens_low"] <= found["before"]["tokens_mean"] <= found["before"]["tokens_high"]

    done = dpo_dist(*words, judged_by(tmp_path, fails=False))
    assert "nothing to do: all 12 steps are done" in done.stdout and "win rate" in done.stdout
    judgment = json.loads((run / "judge.json").read_text())
    seen = json.loads((tmp_path / "seen.json").read_text())
    answers = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    before, after = ([row["completion"] for row in answers if row["step"] == step] for step in (0, 12))
    assert sorted((row["a"], row["b"]) for row in seen) == sorted([*zip(before, after, strict=True),
                                                                   *zip(after, before, strict=True)])
    wins = [(a.count(3) > b.count(3)) + (a.count(3) == b.count(3)) / 2 for a, b in zip(after, before, strict=True)]
    assert judgment["won"] == wins and judgment["win_rate"]["value"] == pytest.approx(sum(wins) / 12)
    assert judgment["against"] == "before" and judgment["position_consistency"] == 1.0
    assert judgment["length_controlled"]["n"] == 12

    asked = (tmp_path / "seen.json").stat().st_mtime_ns
    dpo_dist(*words, judged_by(tmp_path, fails=False))
    assert (tmp_path / "seen.json").stat().st_mtime_ns == asked, "it was asked already"

    evaluated = ["eval", *words[1:], judged_by(tmp_path, fails=False), f"run.dir={tmp_path / 'eval'}"]
    assert "eval.judge.against=chosen" in dpo_dist(*evaluated, code=2).stderr
    dpo_dist(*evaluated, "eval.judge.against=chosen")
    seen = json.loads((tmp_path / "seen.json").read_text())
    lines = (tmp_path / "held_out.jsonl").read_text().splitlines()
    chosen = {tuple(json.loads(line)["chosen_ids"][:-1]) for line in lines}
    assert all(tuple(row["a"]) in chosen or tuple(row["b"]) in chosen for row in seen) and len(seen) == 24


def test_a_judge_whose_program_is_not_there_is_told_before_anything_is_computed(tmp_path: Path, words: list[str]):
    failed = dpo_dist(*words, "zero=none", "eval.samples=4", "eval.judge.command=[no-such-judge]", code=2)
    assert "there is no program 'no-such-judge'" in failed.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()
