"""Points on their intervals: what the plots of accuracy share."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_dist.report.figures import SYMBOLS, Numbers, Trace, colour, error_bars
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import Interval

# (which run of the page, the run, its last evaluation) of the runs that have one
Known = Sequence[tuple[int, RunFiles, Row]]


def named(run: RunFiles, of: int, what: str) -> str:
    """What, with the run's name where the page has several."""
    return f"{run.name} · {what}" if of > 1 else what


def dots(name: str, at: int, labels: list[str], intervals: Sequence[Interval]) -> Trace:
    """Points on horizontal intervals, one a label."""
    values, lows, highs = ([number(interval.get(key)) for interval in intervals] for key in ("value", "low", "high"))
    return {"name": name, "mode": "markers", "x": values, "y": labels, "low": lows, "high": highs, "orientation": "h",
            "n": [interval.get("n") for interval in intervals], "error_x": error_bars(lows, values, highs, colour(at)),
            "marker": {"color": colour(at), "size": 9, "symbol": SYMBOLS[at % len(SYMBOLS)]},
            "hovertemplate": "%{y}: %{x:.3f}<extra>%{fullData.name}</extra>"}


def dot_numbers(caption: str, trace: int, what: str, value: str) -> Numbers:
    return Numbers(caption, ((what, trace, "y"), (value, trace, "x"), ("low", trace, "low"), ("high", trace, "high"),
                             ("pairs", trace, "n")))


def coin() -> dict[str, Any]:
    return {"type": "line", "x0": 0.5, "x1": 0.5, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": "muted", "width": 1, "dash": "dot"}}
