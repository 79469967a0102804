"""What each pair taught: the data map, and the pairs that were never learned, learned then lost, or look flipped."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_dist.report.figures import Figure, Numbers, axis, grid
from dpo_dist.report.markup import Markup, details, joined, markup, paragraph, table
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import counted, plain

FIRST = 15                               # entries of a table that are shown at once
KINDS = {
    "suspects": ("Suspects", "Pairs whose label looks flipped, the most suspicious first: look at these rows before "
                             "the next round. dpo-dist next leaves them out."),
    "never_learned": ("Never learned", "Pairs whose chosen answer never got ahead: noise, or harder than the rest."),
    "forgotten": ("Learned, then lost", "Pairs that were right at some visit and are wrong at the last one, those that "
                                        "fell furthest first."),
}


def pairs_section(runs: Sequence[RunFiles]) -> Section | None:
    """None where no run kept what its pairs showed."""
    known = [run for run in runs if run.datamap is not None]
    if not known:
        return None
    figures = [_map(at, run, len(runs)) for at, run in enumerate(known) if (run.datamap or {}).get("map")]
    tables = [_tables(run, len(runs)) for run in known]
    return Section("pairs", "What each pair taught", joined([grid(figures), *tables]), figures)


def pair_counts(datamap: Row) -> dict[str, int]:
    """How many pairs were never learned, were forgotten, and look flipped, as far as the file says."""
    counts = datamap.get("counts") or {}
    return {kind: int(counts.get(kind, 0 if kind == "suspects" else len(datamap.get(kind) or []))) for kind in KINDS}


def _map(at: int, run: RunFiles, of: int) -> Figure:
    found: dict[str, list[Any]] = (run.datamap or {})["map"]
    if not any(found["variability"]):
        return _seen_once(at, run, of, found)
    pairs = (run.datamap or {}).get("pairs")
    shown = len(found["confidence"])
    drawn = f"{shown:,} of {plain(pairs)} pairs are drawn. " if isinstance(pairs, int) and shown < pairs else ""
    where = [str(place) for place in found.get("where") or [""] * shown]
    trace = {"name": run.name, "mode": "markers", "x": found["variability"], "y": found["confidence"], "text": where,
             "correct": found["correct"],
             "marker": {"size": 6, "opacity": 0.75, "color": found["correct"], "cmin": 0, "cmax": 1,
                        "colorscale": "theme", "showscale": True,
                        "colorbar": {"title": {"text": "share right", "side": "right"}, "thickness": 10,
                                     "outlinewidth": 0, "len": 0.9}},
             "hovertemplate": "%{text}<br>confidence %{y:.3f}<br>variability %{x:.3f}<extra></extra>"}
    title = f"Data map of {run.name}" if of > 1 else "Data map"
    text = (f"{drawn}Each point is a pair: how sure the policy was of the chosen answer on average over its visits, "
            "and how much that moved. Top left is easy, the right is ambiguous and teaches most, bottom left is hard "
            "or mislabelled. The colour is the share of visits at which it was right.")
    return Figure(f"data-map-{at}", title, text, [trace], {
        "xaxis": axis("variability", rangemode="tozero"), "yaxis": axis("confidence"), "height": 400},
        [Numbers(run.name, (("where", 0, "text"), ("confidence", 0, "y"), ("variability", 0, "x"),
                            ("right", 0, "correct")))], is_wide=True)


def _seen_once(at: int, run: RunFiles, of: int, found: dict[str, list[Any]]) -> Figure:
    """Of pairs with one visit each, nothing is known of how their confidence moves: it alone is drawn, in order."""
    places = found.get("where") or [""] * len(found["confidence"])
    ordered = sorted(zip(found["confidence"], map(str, places), strict=True))
    trace = {"name": run.name, "mode": "markers", "x": [(i + 0.5) / len(ordered) for i in range(len(ordered))],
             "y": [confidence for confidence, _ in ordered], "text": [place for _, place in ordered],
             "marker": {"size": 6, "opacity": 0.75, "color": "c0"},
             "hovertemplate": "%{text}<br>confidence %{y:.3f}<extra></extra>"}
    half = {"type": "line", "y0": 0.5, "y1": 0.5, "x0": 0, "x1": 1, "xref": "paper",
            "line": {"color": "muted", "width": 1, "dash": "dot"}}
    title = f"Confidence of {run.name}" if of > 1 else "Confidence"
    text = ("Each point is a pair: how sure the policy was of the chosen answer when it was trained on, which was "
            "once. Below the dotted line it preferred the other answer. With two epochs or more this is a map that "
            "shows also how much that moves.")
    return Figure(f"data-map-{at}", title, text, [trace], {
        "xaxis": axis("share of the pairs that are less sure", range=[0, 1]), "yaxis": axis("confidence"),
        "shapes": [half], "height": 320}, [Numbers(run.name, (("where", 0, "text"), ("confidence", 0, "y")))],
        is_wide=True)


def _tables(run: RunFiles, of: int) -> Markup:
    datamap, parts = run.datamap or {}, []
    for kind, (title, _) in KINDS.items():
        entries = datamap.get(kind) or []
        named = f"{run.name}: {title}" if of > 1 else title
        if not entries:
            continue
        more = details(f"{counted(len(entries) - FIRST, 'more', 'more')}", _table(entries[FIRST:], f"{named}, the rest")
                       ) if len(entries) > FIRST else Markup("")
        parts.append(markup("<h3>{}</h3>{}{}{}", named, paragraph(_told(kind, datamap)),
                            _table(entries[:FIRST], named), more))
    if not parts:
        seen = f"{plain(datamap.get('pairs'))} pairs at {plain(datamap.get('visits'))} visits"
        name = f"{run.name}: " if of > 1 else ""
        parts.append(paragraph(f"{name}none of {seen} was never learned, lost again, or looks flipped."))
    return joined(parts)


def _told(kind: str, datamap: Row) -> str:
    """What a table's entries are, and how many there are of them in all."""
    text, found, listed = KINDS[kind][1], pair_counts(datamap)[kind], len(datamap[kind])
    if kind != "suspects":
        return text + (f" {found:,} in all; suspects.jsonl has every pair." if found > listed else "")
    if not found:
        return text if "counts" not in datamap else (
            "No label looks flipped. These pairs are the least convincing ones, the first the least of all.")
    return f"{text} About {found:,} look flipped, by their order here; suspects.jsonl has every pair."


def _table(entries: Sequence[Row], label: str) -> Markup:
    rows = [[markup("<code>{}</code>", entry.get("where")), _source(entry), plain(entry.get("score")),
             plain(entry.get("confidence")), plain(entry.get("variability")), _margins(entry.get("margins") or [])]
            for entry in entries]
    return table(["where", "source", "score", "confidence", "variability", "margin at each visit"], rows, label,
                 ("", "", "n", "n", "n", "words"), stacks=True)


def _source(entry: Row) -> str:
    """Its data set, unless the place says it."""
    source = str(entry.get("source") or "")
    return "" if str(entry.get("where")).startswith(source) else source


def _margins(margins: Sequence[Any]) -> str:
    """At most eight, the first and the last among them."""
    found = [plain(round(value, 3)) for margin in margins if (value := number(margin)) is not None]
    return " → ".join(found if len(found) <= 8 else [*found[:4], "…", *found[-3:]])
