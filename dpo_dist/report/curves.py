"""The curves of training: what each logged step and each held-out evaluation measured, with the guard's events."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.report.figures import DASHES, SYMBOLS, Figure, Numbers, Trace, axis, colour, folded
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import counted
from dpo_dist.report.thinning import MEAN_FROM, MOST_POINTS, moving_mean, thinned, window_of

MOST_EVENTS = 40                         # of the guard, drawn in each curve


@dataclass(frozen=True)
class Curve:
    """One plot over the steps. names: {metric: what it is called beside others in the same plot}."""

    key: str
    title: str
    unit: str
    text: str
    names: dict[str, str]
    guarded: bool = False                # whether the guard's events are drawn in it
    axis: dict[str, Any] = field(default_factory=dict)               # of y, as Plotly takes it


CURVES = (
    Curve("loss", "Loss", "loss", "What training minimizes. Held-out loss that rises while training loss falls means "
          "that the policy learns the pairs by heart.", {"loss": ""}, guarded=True),
    Curve("accuracy", "Reward accuracy", "share of pairs", "The share of pairs whose chosen answer has the higher "
          "implied reward. 0.5 is a coin.", {"rewards/accuracies": ""}, guarded=True),
    Curve("margin", "Reward margin", "beta × nats", "How much higher the chosen answer's implied reward is, on "
          "average.", {"rewards/margins": ""}, guarded=True),
    Curve("rewards", "Rewards of both answers", "beta × nats", "The margin's two sides. It may grow although both "
          "fall: then the policy forgets both answers, the rejected one faster.",
          {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, guarded=True),
    Curve("logps", "Log-probs of both answers", "nats an answer", "How likely the policy finds whole answers. A "
          "chosen curve that falls all the way is displacement.",
          {"logps/chosen": "chosen", "logps/rejected": "rejected"}, guarded=True),
    Curve("drift", "Drift of the chosen answers", "nats a token", "How much likelier than under the reference the "
          "chosen answers are. Below 0 even they became less likely.", {"reference/chosen_drift_per_token": ""},
          guarded=True),
    Curve("kl", "KL to the reference, estimated", "nats a token", "How far the policy went from the reference: k3 on "
          "the data's answers. It ranks runs, and is no KL to be quoted.", {"reference/kl_per_token": ""},
          guarded=True),
    Curve("grad-norm", "Gradient norm", "before clipping", "Spikes that last mean that the learning rate is too high.",
          {"grad_norm": ""}),
    Curve("lr", "Learning rate", "a step", "As the schedule set it.", {"lr": ""}),
    Curve("speed", "Speed", "tokens a second", "Dips that come back are evaluations, checkpoints or a busy machine.",
          {"perf/tokens_per_second": ""}, axis={"rangemode": "tozero", "tickformat": ","}),
    Curve("memory", "Peak memory of a rank", "GiB", "On a GPU its own memory, on a CPU the process's.",
          {"perf/peak_memory_gib": ""}, axis={"rangemode": "tozero"}),
)


def curve_figures(runs: Sequence[RunFiles], curves: Sequence[Curve] = CURVES, held_out_only: bool = False
                  ) -> list[Figure]:
    """A figure for each curve that some run has values of."""
    figures = []
    for curve in curves:
        traces: list[Trace] = []
        for at, run in enumerate(runs):
            for which, (metric, side) in enumerate(curve.names.items()):
                traces += _of_metric(run, metric, side, _Look(at, len(runs), which, len(curve.names)), held_out_only)
        if traces:
            figures.append(_figure(curve, traces, runs))
    return figures


def thinned_note(runs: Sequence[RunFiles]) -> str:
    """What is said of long runs; empty where nothing is left out."""
    longest = max((len(run.training) for run in runs), default=0)
    if longest <= MOST_POINTS:
        return ""
    return (f"Of {longest:,} logged steps each curve shows {MOST_POINTS:,}: the lowest and the highest of equal "
            "stretches, so no spike is lost. All of them are in metrics.jsonl.")


@dataclass(frozen=True)
class _Look:
    """Which of how many runs, and which of a plot's metrics: what sets a line apart."""

    run: int
    runs: int
    metric: int
    metrics: int

    def colour(self, held_out: bool) -> str:
        """A run's own; of a single run one for each metric, or where it has one, for each split."""
        if self.runs > 1:
            return colour(self.run)
        return colour(self.metric if self.metrics > 1 else int(held_out))

    @property
    def dash(self) -> str:
        return DASHES[self.metric % len(DASHES)] if self.runs > 1 else "solid"


def _of_metric(run: RunFiles, metric: str, side: str, look: _Look, held_out_only: bool) -> list[Trace]:
    def name(what: str) -> str:
        told = "" if held_out_only and look.runs > 1 else what
        return " · ".join(filter(None, (run.name if look.runs > 1 else "", side, told)))

    traces: list[Trace] = []
    x, y = points(run.training, metric)
    if x and not held_out_only:
        line = {"color": look.colour(False), "width": 1.5, "dash": look.dash}
        raw = dict(zip("xy", thinned(x, y), strict=True))
        # a schedule, and what hardly varies, is no noise to be averaged
        if len(x) < MEAN_FROM or metric == "lr":
            traces.append({"name": name("training"), "mode": "lines" if len(x) > 1 else "markers", "line": line, **raw})
        else:
            window = window_of(len(x))
            if look.runs * look.metrics == 1:
                traces.append({"name": name("training"), "mode": "lines", "opacity": 0.4, "line": {**line, "width": 1},
                               **raw})
            means = dict(zip("xy", moving_mean(x, y, window), strict=True))
            traces.append({"name": name(f"training, mean of {window}"), "mode": "lines", "line": line, **means})
    x, y = points(run.held_out, metric)
    if x:
        x, y = thinned(x, y)
        look_of = look.colour(True)
        traces.append({"name": name("held out"), "mode": "lines+markers", "x": x, "y": y,
                       "line": {"color": look_of, "width": 2, "dash": look.dash},
                       "marker": {"color": look_of, "size": 7, "symbol": SYMBOLS[look.run % len(SYMBOLS)]}})
    return traces


def points(rows: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have a finite value."""
    found = [(row["step"], value) for row in rows if (value := number(row.get(metric))) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _figure(curve: Curve, traces: list[Trace], runs: Sequence[RunFiles]) -> Figure:
    numbers = [Numbers(trace["name"], (("step", i, "x"), (curve.unit, i, "y"))) for i, trace in enumerate(traces)]
    shapes: list[dict[str, Any]] = []
    if events := _guard_events(runs) if curve.guarded else []:
        traces.append(_guard_trace(events))
        shapes = [{"type": "line", "x0": event.step, "x1": event.step, "y0": 0, "y1": 1, "yref": "paper",
                   "line": {"color": event.colour, "width": 1, "dash": "dot"}} for event in events]
        numbers.append(Numbers("guard", (("step", len(traces) - 1, "x"), ("event", len(traces) - 1, "text"))))
    layout: dict[str, Any] = {"xaxis": axis("step"), "shapes": shapes,
                              "yaxis": axis(curve.unit, **curve.axis)}
    if shapes:
        layout["yaxis2"] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return Figure(curve.key, curve.title, curve.text, traces, layout, numbers)


@dataclass(frozen=True)
class _Event:
    """A time that the guard spoke."""

    step: int
    words: str
    colour: str


def _guard_events(runs: Sequence[RunFiles]) -> list[_Event]:
    return [_Event(event["step"], folded((f"{run.name}: " if len(runs) > 1 else "") + f"{event.get('guard', '')}, "
                                         f"{event.get('action', '')}: {event.get('message', '')}"),
                   "bad" if event.get("action") == "stop" else "warn")
            for run in runs for event in run.guard[:MOST_EVENTS] if isinstance(event.get("step"), int)]


def _guard_trace(events: Sequence[_Event]) -> Trace:
    """Marks at the top edge that say on hover what the guard saw."""
    return {"name": "guard", "mode": "markers", "yaxis": "y2", "x": [event.step for event in events],
            "y": [1] * len(events), "cliponaxis": False, "text": [event.words for event in events],
            "hovertemplate": "step %{x}<br>%{text}<extra></extra>",
            "marker": {"symbol": "triangle-down", "size": 11, "color": [event.colour for event in events]}}


def length_figure(runs: Sequence[RunFiles]) -> list[Figure]:
    """How long the sampled answers are at each evaluation; nothing where there were fewer than two."""
    traces: list[Trace] = []
    for at, run in enumerate(runs):
        tokens: dict[int, list[float]] = {}
        for row in run.samples:
            if (value := number(row.get("tokens"))) is not None and isinstance(row.get("step"), int):
                tokens.setdefault(row["step"], []).append(value)
        if len(tokens) > 1:
            traces.append({"name": f"{run.name} · sampled answers" if len(runs) > 1 else "sampled answers",
                           "mode": "lines+markers", "x": sorted(tokens),
                           "y": [sum(tokens[step]) / len(tokens[step]) for step in sorted(tokens)],
                           "line": {"color": colour(at)}, "marker": {"symbol": SYMBOLS[at % len(SYMBOLS)], "size": 7}})
    curve = Curve("answer-length", "Length of sampled answers", "tokens, mean",
                  f"At each evaluation the same {counted(_prompts(runs), 'held-out prompt')} are answered. Growth "
                  "without better answers is length bias at work.", {}, guarded=True)
    return [_figure(curve, traces, runs)] if traces else []


def _prompts(runs: Sequence[RunFiles]) -> int:
    return max(sum(row.get("step") == run.samples[0].get("step") for row in run.samples) if run.samples else 0
               for run in runs)
