"""What the held-out pairs say: accuracy against its baselines, calibration, displacement, RewardBench, the judge."""
from __future__ import annotations

from collections.abc import Sequence

from dpo_dist.report.figures import SYMBOLS, Figure, Numbers, Trace, axis, colour, error_bars, grid
from dpo_dist.report.intervals import Known, coin, dot_numbers, dots, named
from dpo_dist.report.markup import NOTHING, Markup, joined, markup, paragraph, table
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import NONE, Interval, percent, plain, share, spread
from dpo_dist.report.slices import slice_figures, slice_tables

POLICY, SHORTER = "the policy", "the policy where\nchosen is shorter"
EQUAL, LONGER = "the policy\nat equal length", "the longer answer"
LIKELIER, LIKELIER_A_TOKEN = "the reference's\nlikelier answer", "the reference's\nlikelier a token"


def held_out_section(runs: Sequence[RunFiles]) -> Section | None:
    """None where no run was evaluated in detail, and none judged."""
    summaries = [(at, run, run.last_evaluation) for at, run in enumerate(runs) if run.last_evaluation is not None]
    known = [(at, run, summary) for at, run, summary in summaries if summary is not None]
    figures = [*accuracy_figures(known, len(runs)), *_over_training(runs), *reliability_figures(known, len(runs)),
               *slice_figures(known, len(runs))]
    parts = [grid(figures), _facts(runs), slice_tables(known, len(runs)), _rewardbench(known, len(runs))]
    if not any(parts):
        return None
    steps = sorted({summary["step"] for _, _, summary in known})
    intro = ("Pairs that were not trained on. Bars are 95\N{NO-BREAK SPACE}% intervals: figures whose bars overlap "
             "widely are not told apart by this many pairs."
             + (f" As of step {', '.join(map(str, steps))}." if steps else ""))
    return Section("held-out", "Held-out pairs", joined([paragraph(intro), *parts]), figures)


# ------------------------------------------------------------------------------------------------------------- accuracy


def accuracies(summary: Row) -> dict[str, Interval]:
    """{what predicts which answer is chosen: its accuracy}, the policy first."""
    baselines = summary.get("baselines") or {}
    found = {POLICY: summary.get("accuracy"), SHORTER: summary.get("length_controlled"),
             EQUAL: summary.get("at_equal_length"), LONGER: baselines.get("length"),
             LIKELIER: baselines.get("reference"), LIKELIER_A_TOKEN: baselines.get("reference_per_token")}
    return {name: of for name, of in found.items() if of and number(of.get("value")) is not None}


def accuracy_figures(known: Known, of: int) -> list[Figure]:
    traces = []
    for at, run, summary in known:
        found = accuracies(summary)
        traces.append(dots(run.name, at, list(found), list(found.values())))
    if not traces:
        return []
    n = max(len(trace["y"]) for trace in traces)
    text = ("How often each way of guessing picks the chosen answer. A policy that is not right of “the longer answer” "
            "may have learned length alone.")
    return [Figure("accuracies", "Accuracy against its baselines", text, traces, {
        "xaxis": axis("share of pairs"), "yaxis": {"autorange": "reversed", "dtick": 1},
        "height": 90 + n * (26 + 14 * of),
        "shapes": [coin()], **({"scattermode": "group"} if of > 1 else {})},
        [dot_numbers(trace["name"], i, "predictor", "accuracy") for i, trace in enumerate(traces)])]


def _over_training(runs: Sequence[RunFiles]) -> list[Figure]:
    """Accuracy with its interval at each evaluation, where there were more than two."""
    traces: list[Trace] = []
    for at, run in enumerate(runs):
        found = [(s["step"], s["accuracy"]) for s in run.evaluations if s.get("accuracy")]
        if len(found) > 2:
            values, lows, highs = ([number(i.get(key)) for _, i in found] for key in ("value", "low", "high"))
            traces.append({"name": run.name, "mode": "lines+markers", "x": [step for step, _ in found], "y": values,
                           "low": lows, "high": highs, "error_y": error_bars(lows, values, highs, colour(at)),
                           "line": {"color": colour(at)},
                           "marker": {"size": 7, "symbol": SYMBOLS[at % len(SYMBOLS)]}})
    numbers = [Numbers(trace["name"], (("step", i, "x"), ("accuracy", i, "y"), ("low", i, "low"), ("high", i, "high")))
               for i, trace in enumerate(traces)]
    return [Figure("accuracy-steps", "Accuracy at each evaluation", "A gain is real where its bar no longer reaches "
                   "the value before training.", traces,
                   {"xaxis": axis("step"), "yaxis": axis("share of pairs")}, numbers)
            ] if traces else []


# ---------------------------------------------------------------------------------------------------------- calibration


def reliability_figures(known: Known, of: int) -> list[Figure]:
    lowest = min((b["predicted"] for _, _, s in known for b in (s.get("calibration") or {}).get("bins") or []
                  if b.get("n")), default=0.0)
    start = 0.5 if lowest >= 0.5 else 0.0                # where bins are by the answer that the policy prefers
    traces: list[Trace] = [{"name": "calibrated", "mode": "lines", "x": [start, 1], "y": [start, 1],
                            "hoverinfo": "skip", "line": {"color": "muted", "width": 1, "dash": "dot"}}]
    for at, run, summary in known:
        bins = [b for b in (summary.get("calibration") or {}).get("bins") or [] if b.get("n")]
        if bins:
            lows, values, highs = ([number(b.get(key)) for b in bins]
                                   for key in ("observed_low", "observed", "observed_high"))
            traces.append({"name": named(run, of, "observed"), "mode": "lines+markers",
                           "x": [b["predicted"] for b in bins], "y": values, "low": lows, "high": highs,
                           "n": [b["n"] for b in bins], "error_y": error_bars(lows, values, highs, colour(at)),
                           "line": {"color": colour(at), "width": 1.5},
                           "marker": {"size": 8, "symbol": SYMBOLS[at % len(SYMBOLS)]},
                           "customdata": [b["n"] for b in bins],
                           "hovertemplate": "predicted %{x:.3f}<br>observed %{y:.3f}<br>%{customdata} pairs"
                                            "<extra></extra>"})
    if len(traces) == 1:
        return []
    numbers = [Numbers(trace["name"], (("predicted", i, "x"), ("observed", i, "y"), ("low", i, "low"),
                                       ("high", i, "high"), ("pairs", i, "n")))
               for i, trace in enumerate(traces) if i]
    return [Figure("reliability", "Reliability of the implied probability",
                   "How often the data prefer the answer that the policy prefers, by the probability that its rewards "
                   "give to that. Below the dotted line the policy is too sure of itself, above it too timid.", traces,
                   {"xaxis": axis("predicted probability", range=[start - 0.03, 1.03]), "yaxis": axis("observed share"),
                    "height": 320}, numbers)]


# ---------------------------------------------------------------------------------------------------------------- facts


def _facts(runs: Sequence[RunFiles]) -> Markup:
    """A table of single figures, a column for each run."""
    found = [facts_of(run) for run in runs]
    names = list(dict.fromkeys(name for facts in found for name in facts))
    if not names:
        return NOTHING
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"]
    rows = [[name, *(facts.get(name, NONE) for facts in found)] for name in names]
    return markup("<h3>In numbers</h3>{}", table(head, rows, "Held-out figures", ("", *["n"] * len(runs))))


def facts_of(run: RunFiles) -> dict[str, str]:
    """{what: figure} of the last evaluation and the judge; what is unknown is left out."""
    s = run.last_evaluation or {}
    calibration, moved, kl = (s.get(key) or {} for key in ("calibration", "displacement", "kl"))
    judge = run.judge or {}
    found = {
        "pairs / prompts": f"{s['pairs']:,} / {s['prompts']:,}" if "pairs" in s and "prompts" in s else NONE,
        **{f"accuracy: {name}".replace("\n", " "): share(interval) for name, interval in accuracies(s).items()},
        "ties among them": plain(s.get("ties")) if s.get("ties") else NONE,
        "calibration error (ECE)": plain(calibration.get("ece")),
        "the same of a calibrated policy, at most": plain(calibration.get("ece_by_chance")),
        "Brier score": plain(calibration.get("brier")),
        "log loss of the probabilities": plain(calibration.get("log_loss")),
        "beta in the probabilities": plain(calibration.get("beta")),
        "beta that would calibrate them": spread({key: calibration.get(f"calibrating_beta{end}") for key, end in (
            ("value", ""), ("low", "_low"), ("high", "_high"))}),
        "log-probs moved since": str(moved.get("since") or NONE),
        "chosen answers' change, nats a token": plain(moved.get("chosen_per_token")),
        "rejected answers' change, nats a token": plain(moved.get("rejected_per_token")),
        "pairs whose chosen answer became less likely": share(moved.get("share_chosen_falling")),
        "pairs whose both answers became less likely": share(moved.get("share_both_falling")),
        "KL to the reference, nats an answer (samples)": spread(kl.get("per_answer")),
        "KL to the reference, nats a token (samples)": plain(kl.get("per_token")),
        "judge: against": {"before": "answers before training", "chosen": "the data's chosen answers"}.get(
            str(judge.get("against")), NONE),
        "judge: win rate": share(judge.get("win_rate")),
        "judge: win rate at equal length": share(judge.get("length_controlled")),
        "judge: same verdict in both orders": percent(judge.get("position_consistency")),
    }
    return {name: value for name, value in found.items() if value != NONE}


def _rewardbench(known: Known, of: int) -> Markup:
    """Accuracy by subset, as the evaluation wrote it: {name: interval or number}, in sections or not."""
    found = {run.name: dict(_leaves(summary.get("rewardbench") or {})) for _, run, summary in known}
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    if not names:
        return NOTHING
    head = ["subset", *(found if of > 1 else ["accuracy (95\N{NO-BREAK SPACE}%)"])]
    rows = [[name, *(scores.get(name, NONE) for scores in found.values())] for name in names]
    missing = sorted({name for _, _, s in known for name in (s.get("rewardbench") or {}).get("missing") or []})
    note = paragraph(f"Subsets without a pair: {', '.join(missing)}.", "note") if missing else NOTHING
    return markup("<h3>RewardBench</h3>{}{}", table(head, rows, "RewardBench", ("", *["n"] * len(found))), note)


def _leaves(found: Row, before: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in found.items():
        where = f"{before} · {name}" if before else str(name)
        if isinstance(value, dict) and "value" not in value:
            rows += _leaves(value, where)
        elif isinstance(value, dict):
            rows.append((where, share(value)))
        elif number(value) is not None:
            is_share = isinstance(value, float) and 0 <= value <= 1
            rows.append((where, percent(value) if is_share else plain(value)))
    return rows
