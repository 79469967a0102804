"""Sections → one HTML file with its styles, its script and Plotly inside. It asks the network for nothing."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.report.figures import Figure
from dpo_dist.report.markup import NOTHING, Markup, joined, markup, script_json
from dpo_dist.report.plotly_js import plotly_base64

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """`html` holds the frames of its figures."""

    key: str
    title: str
    html: Markup
    figures: Sequence[Figure]


def page(title: str, note: str, sections: Sequence[Section]) -> Markup:
    """The whole file. Without a plot in it, it has no Plotly either."""
    figures = [figure for section in sections for figure in section.figures]
    links = joined(markup('<li><a href="#{}">{}</a></li>', section.key, section.title) for section in sections)
    body = joined(markup('<section id="{}" aria-labelledby="{}-title"><h2 id="{}-title">{}</h2>{}</section>',
                         section.key, section.key, section.key, section.title, section.html) for section in sections)
    plotly = markup('<script type="application/octet-stream" id="plotly">{}</script>', Markup(plotly_base64())
                    ) if figures else NOTHING
    return joined([
        markup('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{}</title>', title),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'
               '<meta name="color-scheme" content="light dark">'
               # a browser would ask for /favicon.ico otherwise
               '<link rel="icon" href="data:,">'),
        markup("<style>{}</style></head><body>", Markup((HERE / "page.css").read_text())),
        markup('<a class="skip" href="#main">To the content</a><header><div><h1>{}</h1><p class="note">{}</p></div>'
               '<button type="button" id="theme" hidden>Colours: as the system</button></header>', title, note),
        markup('<nav aria-label="Sections"><ul>{}</ul></nav>', links),
        markup('<main id="main" tabindex="-1"><noscript><p class="note">Without JavaScript there are no plots; their '
               "numbers are in report.json.</p></noscript>{}</main>", body),
        markup('<script type="application/json" id="figures">{}</script>', script_json([f.as_json() for f in figures])),
        plotly,
        markup("<script>{}</script></body></html>\n", Markup((HERE / "page.js").read_text()))], "\n")
