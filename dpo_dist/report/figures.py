"""Figures as plain dicts for Plotly's JavaScript, with a sentence on how to read each, and the numbers behind it.

Colours are names that page.js gives a value to, for light and dark: c0 to c7 of runs, and good, warn, bad, muted, text.
"""
from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.report.markup import Markup, joined, markup

Trace = dict[str, Any]
COLOURS = 8
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "x")


@dataclass(frozen=True)
class Numbers:
    """A table of what a trace shows: its columns as (title, trace number, name of the trace's list)."""

    caption: str
    columns: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Figure:
    """One plot. `key`: its id, unique in a page. `text`: what is seen and how to read it."""

    key: str
    title: str
    text: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    numbers: Sequence[Numbers] = ()
    is_wide: bool = False                # the whole width of the page

    def html(self) -> Markup:
        """The frame that page.js draws into."""
        kind, key = "wide-plot" if self.is_wide else "", f"plot-{self.key}"
        return markup(
            '<figure class="{}" aria-labelledby="{}-title"><figcaption><h3 id="{}-title">{}</h3><p>{}</p></figcaption>'
            '<div class="plot" id="{}" tabindex="0" role="img" aria-label="{}"></div>'
            '<p class="reading" role="status"></p>'
            '<details class="numbers" data-plot="{}"><summary>The numbers</summary></details></figure>',
            kind, key, key, self.title, self.text, key,
            f"Plot: {self.title}. With the arrow keys its points are read one by one.", self.key)

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "traces": list(self.traces), "layout": dict(self.layout),
                "numbers": [{"caption": n.caption, "columns": n.columns} for n in self.numbers]}

    def values(self) -> dict[str, Any]:
        """What report.json says of it."""
        return {"title": self.title, "tables": [
            {"of": n.caption, **{title: _of(self.traces[trace], name) for title, trace, name in n.columns}}
            for n in self.numbers]}


def _of(trace: Trace, name: str) -> Any:
    found: Any = trace
    for part in name.split("."):
        found = found[part]
    return found


def grid(figures: Sequence[Figure]) -> Markup:
    """Figures beside each other where there is room."""
    return markup('<div class="plots">{}</div>', joined(figure.html() for figure in figures)) if figures else Markup("")


def colour(run: int) -> str:
    return f"c{run % COLOURS}"


def folded(words: str) -> str:
    """The words in lines that fit beside a point of a plot on a phone; no more than a few of them."""
    return "\n".join(textwrap.wrap(words, 40, max_lines=8, placeholder=" …"))


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def error_bars(low: Sequence[float | None], value: Sequence[float | None], high: Sequence[float | None], color: str
               ) -> dict[str, Any]:
    """Plotly's error bars of intervals; a point without one has none."""
    up = [None if a is None or b is None else round(b - a, 6) for a, b in zip(value, high, strict=True)]
    down = [None if a is None or b is None else round(a - b, 6) for a, b in zip(value, low, strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5, "width": 4,
            "color": color}
