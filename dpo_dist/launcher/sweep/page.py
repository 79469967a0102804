"""<sweep>/sweep.html: a sweep's table and plots in one file that needs no network. The plots are written as SVG."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dpo_dist.launcher.sweep.groups import shown
from dpo_dist.launcher.sweep.results import COLUMNS, DRIFT, KL, Result, best, columns, command_of, rows

PLOTS = ("rewards/accuracies", "rewards/margins", KL, DRIFT)
UNITS = {"rewards/accuracies": "share of held-out pairs", "rewards/margins": "beta × nats",
         KL: "nats a token, k3 on the data's completions", DRIFT: "nats a token, policy − reference"}
# Paul Tol's colours, made for colour-blind readers too
COLORS = ("#4477aa", "#ee6677", "#228833", "#aa7700", "#66ccee", "#aa3377", "#777777", "#000000")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 280, 62, 14, 14, 44      # of a plot and its margins, in pixels

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em }
body { color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
tr.best { background: #eef4e8; font-weight: 600 }
figure { display: inline-block; margin: 0 1em 1em 0 }
figcaption small, .note { color: #666 }
pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere }
svg text { font: 11px system-ui, sans-serif; fill: #444 }"""


@dataclass(frozen=True)
class Line:
    """Points of one colour, joined in the order of x where `joined`; each is (x, y, what it is)."""

    name: str
    points: tuple[tuple[float, float, str], ...]
    joined: bool


def write_page(path: Path, results: Sequence[Result], objective: str) -> None:
    chosen = best(results, objective)
    head, *body = rows(results)
    cells = "".join(_row(row, "best" if r is chosen else "") for row, r in zip(body, results, strict=True))
    failed = "".join(f"<li>{escape(r.job.name)}: {escape(r.message)}</li>" for r in results if not r.done)
    path.write_text("\n".join([
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8"><title>dpo-dist sweep</title>',
        f"<style>{STYLE}</style></head><body>", f"<h1>{len(results)} runs, compared on held-out pairs</h1>",
        _best(chosen, objective) if chosen else "<p>No run has a result yet.</p>",
        f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{cells}</table>",
        f"<h2>Not done</h2><ul>{failed}</ul>" if failed else "", "<h2>Plots</h2>", *plots(results),
        '<p class="note">The KL estimate is taken on the completions of the data, not on samples of the policy: it '
        "ranks these runs, and is no KL to be quoted. A chosen drift below 0 means that the policy makes even the "
        "chosen completions less likely.</p>", "</body></html>", ""]))


def _best(chosen: Result, objective: str) -> str:
    return (f"<p>Best by held-out {escape(COLUMNS.get(objective, objective))}: <b>{escape(chosen.job.name)}</b>, in "
            f"<code>{escape(str(chosen.job.run_dir))}</code>. To train the same "
            f"again:</p><pre>{escape(command_of(chosen.job))}</pre>")


def _row(cells: Sequence[str], kind: str) -> str:
    return f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


# ---------------------------------------------------------------------------------------------------------------- plots


def plots(results: Sequence[Result]) -> list[str]:
    """Plots of each metric over the learning rate (else the first swept number), a line for each other value.

    Where the rest takes more values than there are colours, as in a random search: over each number that is swept,
    points alone.
    """
    keys, names = columns(results)
    numbers = [key for key in keys if all(_number(r, key) is not None for r in results)]
    if not numbers:
        return ["<p>No number is swept: see the table.</p>"]
    x = "optim.lr" if "optim.lr" in numbers else numbers[0]
    rest = [key for key in keys if key != x]
    lines = {" ".join(f"{key}={shown(r.job.swept.get(key))}" for key in rest) for r in results}
    if len(lines) <= len(COLORS):
        return [figure(name, x, _lines(results, name, x, rest)) for name in PLOTS if name in names]
    return [figure(name, key, _lines(results, name, key, [])) for name in PLOTS if name in names for key in numbers]


def _lines(results: Sequence[Result], name: str, x: str, rest: Sequence[str]) -> list[Line]:
    found: dict[str, list[tuple[float, float, str]]] = {}
    for r in results:
        at, y = _number(r, x), r.metrics.get(name, math.nan)
        if at is not None and math.isfinite(y):
            line = " ".join(f"{key}={shown(r.job.swept.get(key))}" for key in rest)
            found.setdefault(line, []).append((at, y, f"{r.job.name}: {y:.4g}"))
    return [Line(line, tuple(sorted(points)), bool(rest)) for line, points in found.items()]


def _number(result: Result, key: str) -> float | None:
    value = result.job.swept.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def figure(name: str, x_name: str, lines: Sequence[Line]) -> str:
    """One plot as an SVG in a <figure>. x is logarithmic if all values are above 0 and span more than a factor of 3."""
    points = [point for line in lines for point in line.points]
    xs, ys = [p[0] for p in points] or [0.0], [p[1] for p in points] or [0.0]
    logarithmic = min(xs) > 0 and max(xs) > 3 * min(xs)
    along = _scale([math.log(x) for x in xs] if logarithmic else xs, LEFT + 10, WIDTH - RIGHT - 10)
    up = _scale(ys, HEIGHT - BOTTOM - 8, TOP + 8)

    def at(x: float) -> float:
        return along(math.log(x) if logarithmic else x)

    marks = [_line(line, color, at, up) for line, color in zip(lines, COLORS * len(lines), strict=False)]
    frame = (f'<path d="M{LEFT} {TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#999"/>'
             f'<text x="{(LEFT + WIDTH) // 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    legend = " ".join(f'<span style="color:{color}">● {escape(line.name)}</span>'
                      for line, color in zip(lines, COLORS, strict=False))
    return (f'<figure><figcaption><b>{escape(COLUMNS[name])}</b> '
            f'<small>{escape(UNITS[name])}</small><br><small>{legend}</small></figcaption>'
            f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(COLUMNS[name])} over '
            f'{escape(x_name)}">{frame}{_x_ticks(xs, at)}{_y_ticks(ys, up)}{"".join(marks)}</svg></figure>')


def _line(line: Line, color: str, at: Callable[[float], float], up: Callable[[float], float]) -> str:
    where = [(at(x), up(y), what) for x, y, what in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in where)
    joined = f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>' if line.joined else ""
    return joined + "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" '
                            f'fill="{color}"><title>{escape(what)}</title></circle>'
                            for x, y, what in where)


def _x_ticks(xs: Sequence[float], at: Callable[[float], float]) -> str:
    """A tick at each value where they are few, else at both ends."""
    values = sorted(set(xs))
    values = values if len(values) <= 6 else [values[0], values[-1]]
    return "".join(f'<path d="M{at(x):.1f} {HEIGHT - BOTTOM} v5" stroke="#999"/>'
                   f'<text x="{at(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:.3g}</text>'
                   for x in values)


def _y_ticks(ys: Sequence[float], up: Callable[[float], float]) -> str:
    low, high = min(ys), max(ys)
    values = [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
    return "".join(f'<path d="M{LEFT} {up(y):.1f} H{WIDTH - RIGHT}" stroke="#eee"/>'
                   f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>' for y in values)


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """A linear map of the values' range to pixels start to end; to the middle where they are all the same."""
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)
