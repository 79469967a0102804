"""<run.dir>/judge.json: what eval.judge makes of the samples, against those before training or the data's answers."""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import JudgeConfig, RunConfig
from dpo_dist.judge import open_judge
from dpo_dist.judge.win_rate import Duel, judge_duels
from dpo_dist.run.generations import SampleRow, samples_by_step
from dpo_dist.run.inputs import Inputs
from dpo_dist.run.samples import Samples
from dpo_dist.runtime.best import exported_step
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal

Answer = tuple[str | list[int], int]     # its text, or token ids, and its tokens


def check_judge(judge: JudgeConfig) -> None:
    """UserError where the judge's program is not there: known before anything is computed."""
    if judge.is_asked:
        open_judge(judge.command, judge.url, judge.key)


def judge_run(config: RunConfig, run_dir: RunDir, inputs: Inputs, total: int, terminal: Terminal) -> None:
    """Asks the judge about the answers of the model that a finished run of `total` steps exports, where one is
    configured and has not been asked yet. Rank 0 calls it last: UserError where it fails, with all else there."""
    judge = config.eval.judge
    if not judge.is_asked:
        return
    step, _ = exported_step(run_dir, config.train.keep_best, total)
    if _is_judged(run_dir, judge, step):
        return
    steps = samples_by_step(run_dir.samples)
    if not {step, *([] if judge.against == "chosen" else [0])} <= steps.keys():
        raise UserError(f"{run_dir.samples} is damaged: it lacks the answers that the judge is to compare; leave "
                        "eval.judge out, or train again in another run.dir")
    theirs = (Samples.of(config, inputs).chosen(inputs.eval) if judge.against == "chosen"
              else [(row["completion"], int(row["tokens"])) for row in steps[0]])
    try:
        judge_samples(config, run_dir, steps[step], theirs, terminal)
    except UserError as error:
        raise UserError(f"the judge failed, and nothing else: the model and all other results are in {run_dir.path}. "
                        f"{error}. The same command asks it again, and does nothing else") from error


def judge_samples(config: RunConfig, run_dir: RunDir, ours: Sequence[SampleRow], theirs: Sequence[Answer],
                  terminal: Terminal) -> None:
    """Asks the judge about samples of one evaluation, writes judge.json and shows it. UserError where it fails."""
    judge = config.eval.judge
    terminal.say(f"asking the judge about {len(ours)} answers, each in both orders: {_name(judge)}")
    found = judge_answers(judge, ours, theirs, config.train.seed)
    write_json(run_dir.judge_json, sealed({"judge": _name(judge), "against": judge.against, "step": ours[0]["step"],
                                           **found}))
    show_judgment(terminal, found, judge.against)
    terminal.say(f"judgment: {run_dir.judge_json}")


def _name(judge: JudgeConfig) -> str:
    return shlex.join(judge.command) if judge.command is not None else str(judge.url)


def _is_judged(run_dir: RunDir, judge: JudgeConfig, step: int) -> bool:
    """Whether judge.json is of this judge, these answers and this step."""
    found = found_sealed(run_dir.judge_json) or {}
    return bool((found.get("judge"), found.get("against"), found.get("step")) == (_name(judge), judge.against, step))


def judge_answers(judge: JudgeConfig, ours: Sequence[SampleRow], theirs: Sequence[Answer], seed: int) -> dict[str, Any]:
    """The rates of judge/win_rate.py, JSON-ready, with each prompt's win and the mean tokens of both."""
    duels = [Duel(row["prompt"], row["completion"], text, int(row["tokens"]), tokens)
             for row, (text, tokens) in zip(ours, theirs, strict=True)]
    asked = open_judge(judge.command, judge.url, judge.key, judge.timeout_seconds)
    rates, won = judge_duels(asked, duels, seed)
    return {**asdict(rates), "tokens": {"ours": float(np.mean([duel.our_tokens for duel in duels])),
                                        "theirs": float(np.mean([duel.their_tokens for duel in duels]))},
            "won": won.tolist()}


def show_judgment(terminal: Terminal, found: dict[str, Any], against: str) -> None:
    """A table of the rates."""
    other = {"before": "those before training", "chosen": "the data's chosen ones"}[against]
    rows = [["win rate", _rate(found["win_rate"])]]
    if found["length_controlled"]:
        rows.append(["win rate at equal length", _rate(found["length_controlled"])])
    rows += [["same verdict in both orders", f"{found['position_consistency']:.0%}"],
             ["tokens, mean", f"{found['tokens']['ours']:.0f} against {found['tokens']['theirs']:.0f}"]]
    terminal.table(f"{len(found['won'])} answers against {other}", ["judged", ""], rows)


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['value']:.1%} (95 % interval {rate['low']:.1%} to {rate['high']:.1%})"
