"""HTML that is escaped unless it is known to be HTML: whatever stands in a run's files stays text."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Markup(str):
    """A string that is HTML. All others are text."""


NOTHING = Markup("")


def markup(template: str, /, *values: object) -> Markup:
    """The template, which is HTML of our own, with each {} filled; what is not Markup is escaped."""
    return Markup(template.format(*(text(value) for value in values)))


def text(value: object) -> Markup:
    """The value as HTML text."""
    return value if isinstance(value, Markup) else Markup(escape(str(value).replace("\0", "\N{REPLACEMENT CHARACTER}")))


def joined(parts: Iterable[Markup], between: str = "") -> Markup:
    found = list(parts)
    assert all(isinstance(part, Markup) for part in found), "text is made HTML before it is joined"
    return Markup(between.join(found))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], label: str, classes: Sequence[str] = (),
          stacks: bool = False) -> Markup:
    """A table in a frame that scrolls sideways and can be reached with the keyboard. classes: of each column; "n" sets
    numbers to the right. stacks: on a phone each row is a block, its cells named by their column."""
    kinds = [*classes, *[""] * (len(head) - len(classes))]
    top = joined(markup('<th scope="col" role="columnheader" class="{}">{}</th>', kind, cell)
                 for cell, kind in zip(head, kinds, strict=True))
    body = joined(markup('<tr role="row">{}</tr>', joined(
        markup('<td role="cell" class="{}" data-column="{}">{}</td>', kind, column, cell)
        for cell, kind, column in zip(row, kinds, head, strict=True))) for row in rows)
    # roles, as a browser takes a table that is laid out as blocks for none
    return markup('<div class="wide" role="region" tabindex="0" aria-label="{}"><table role="table" class="{}">'
                  '<thead role="rowgroup"><tr role="row">{}</tr></thead><tbody role="rowgroup">{}</tbody></table>'
                  "</div>", label, "stacks" if stacks else "", top, body)


def details(summary: object, inside: Markup, is_open: bool = False) -> Markup:
    return markup("<details{}><summary>{}</summary>{}</details>", Markup(" open" if is_open else ""), summary, inside)


def paragraph(words: object, kind: str = "") -> Markup:
    return markup('<p class="{}">{}</p>', kind, words) if kind else markup("<p>{}</p>", words)


def badge(level: str, words: object) -> Markup:
    """A word in the colour of its level: good, info, warning or error."""
    return markup('<span class="badge {}">{}</span>', level, words)


def script_json(value: Any) -> Markup:
    """JSON that may stand inside <script>: no character of it ends the element, or opens a comment."""
    dumped = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
