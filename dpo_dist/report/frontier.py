"""The reward–KL frontier: how good each run is against how far it went from its reference."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dpo_dist.report.figures import SYMBOLS, Figure, Numbers, Trace, axis, colour, error_bars, grid
from dpo_dist.report.markup import joined, paragraph
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import Interval, plain

K3 = "reference/kl_per_token"
BESIDE = ("top right", "bottom right", "top left", "bottom left")     # labels of each line; of more lines none
SAMPLES, ESTIMATE = "nats an answer, from samples", "nats a token, k3 on the data"


@dataclass(frozen=True)
class Point:
    """A run, or one evaluation of it."""

    of: str                              # the line that it is on
    name_of_run: str
    name: str
    kl: float
    reward: float
    low: float | None = None
    high: float | None = None
    beta: float | None = None
    label: str = ""                      # beside the point


def frontier_section(runs: Sequence[RunFiles], lines: Mapping[str, str] | None = None) -> Section | None:
    """Of several runs each is a point, of a single run each evaluation. None where nothing can be drawn.

    lines: {name of a run: the line it is on}, of runs that differ in beta along a line; without it runs are not joined.
    """
    single = len(runs) == 1
    unit, of_reward = _unit(runs), _reward(runs)
    points = []
    for run in runs:
        found = [point for summary in evaluated(run) if (point := _point(run, summary, unit, of_reward, single))]
        points += found if single else found[-1:]
    if len(points) < 2:
        return None
    if lines:
        points = sorted((replace(p, of=lines[p.name_of_run]) for p in points), key=lambda p: (p.of, p.beta or 0.0))
    if single:
        title, text = "Way over training", (
            "Each point is an evaluation, from the start at the left. The way bends to the right where training still "
            "moves the policy and no longer improves it.")
    else:
        title, text = "Frontier", (
            "Each point is a run. Above and to the left is better: more reward for less distance from the reference. A "
            "smaller beta usually stands further to the right.")
    figures = [frontier_figure("frontier", title, text, points, unit, of_reward, joins=single or bool(lines))]
    note = (paragraph("The distance is estimated on the data's own answers and not from samples of the policy, so it "
                      "ranks these runs and is no KL to be quoted.", "note") if unit == ESTIMATE else joined([]))
    return Section("frontier", "Reward against distance", joined([grid(figures), note]), figures)


def frontier_figure(key: str, title: str, text: str, points: Sequence[Point], kl_unit: str, reward_name: str,
                    joins: bool) -> Figure:
    """joins: the points of a line are joined, in their order."""
    lines = {name: [p for p in points if p.of == name] for name in dict.fromkeys(p.of for p in points)}
    traces: list[Trace] = []
    for at, (name, found) in enumerate(lines.items()):
        lows, values, highs = [p.low for p in found], [p.reward for p in found], [p.high for p in found]
        traces.append({
            "name": name, "mode": ("lines+markers" if joins else "markers") + "+text" * (len(lines) <= len(BESIDE)),
            "x": [p.kl for p in found], "y": values, "low": lows, "high": highs, "cliponaxis": False,
            "run": [p.name for p in found], "beta": [p.beta for p in found], "customdata": [p.name for p in found],
            "text": [p.label for p in found], "textposition": BESIDE[at % len(BESIDE)],
            "textfont": {"size": 11, "color": "soft"}, "error_y": error_bars(lows, values, highs, colour(at)),
            "line": {"color": colour(at), "width": 1, "dash": "dot"},
            "marker": {"color": colour(at), "size": 10, "symbol": SYMBOLS[at % len(SYMBOLS)]},
            "hovertemplate": "%{customdata}<br>KL %{x:.4g}<br>%{y:.4g}<extra></extra>"})
    numbers = [Numbers(trace["name"], (("run", i, "run"), ("beta", i, "beta"), ("KL", i, "x"), (reward_name, i, "y"),
                                       ("low", i, "low"), ("high", i, "high"))) for i, trace in enumerate(traces)]
    above_0 = [p.kl for p in points if p.kl > 0]
    most = max(above_0, default=1.0)
    # a run's own way begins at 0, give or take rounding
    wide = len(above_0) == len(points) and min(above_0) > 1e-6 and max(above_0) > 50 * min(above_0)
    return Figure(key, title, text, traces, {
        "xaxis": axis(f"KL to the reference\n{kl_unit}",
                      **({"type": "log"} if wide else {"range": [-0.04 * most, 1.12 * most]})),
        "yaxis": axis(reward_name), "height": 360}, numbers, is_wide=True)


def evaluated(run: RunFiles) -> list[Row]:
    """The run's evaluations by step, those of evaluation.json with what metrics.jsonl has of the same step."""
    rows = {row["step"]: dict(row) for row in run.held_out}
    for summary in run.evaluations:
        rows.setdefault(summary["step"], {"step": summary["step"]}).update(summary)
    return [rows[step] for step in sorted(rows)]


def _unit(runs: Sequence[RunFiles]) -> str:
    """One for all: from samples only where every run has that."""
    return SAMPLES if all(any(_sampled_kl(s) for s in run.evaluations) for run in runs) else ESTIMATE


def _sampled_kl(summary: Row) -> Interval | None:
    found = (summary.get("kl") or {}).get("per_answer")
    return found if found and number(found.get("value")) is not None else None


def _reward(runs: Sequence[RunFiles]) -> str:
    """What stands for reward: a known reward of samples where every run has it, else the judge, else accuracy."""
    if all(any(s.get("reward") for s in run.evaluations) for run in runs):
        return "reward of samples"
    if len(runs) > 1 and all((run.judge or {}).get("win_rate") for run in runs):
        return "win rate by the judge"
    return "held-out accuracy"


def _point(run: RunFiles, summary: Row, unit: str, of_reward: str, single: bool) -> Point | None:
    kl = number((_sampled_kl(summary) or {}).get("value")) if unit == SAMPLES else number(summary.get(K3))
    interval: Interval | None = {"value": summary.get("rewards/accuracies"), **(summary.get("accuracy") or {})}
    if of_reward == "reward of samples":
        interval = summary.get("reward")
    elif of_reward == "win rate by the judge":
        interval = (run.judge or {}).get("win_rate")
    reward = number((interval or {}).get("value"))
    if kl is None or reward is None or interval is None or not math.isfinite(reward):
        return None
    beta = f", beta {plain(run.beta)}" if run.beta and "beta" not in run.name else ""
    name = f"step {summary['step']}" if single else run.name + beta
    low, high = number(interval.get("low")), number(interval.get("high"))
    label = f" {summary['step']}" if single else "" if run.beta is None else f" β {plain(run.beta)}"
    return Point(run.name, run.name, name, kl, reward, low, high, run.beta, label)

