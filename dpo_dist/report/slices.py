"""Held-out accuracy by slice: a plot of the flagged and the largest ones, and a table of all."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence

from dpo_dist.report.figures import Figure, Numbers, Trace, axis, colour
from dpo_dist.report.intervals import Known, dot_numbers, dots, named
from dpo_dist.report.markup import Markup, badge, details, joined, table
from dpo_dist.report.run_files import Row
from dpo_dist.report.shown import plain, share

Key = tuple[str, str]                    # what the pairs are sliced by, and the slice's value
SHOWN_SLICES = 24                        # in the plot; the table has all of them


def slice_figures(known: Known, of: int) -> list[Figure]:
    """The accuracy of slices: the flagged ones and the largest others."""
    wanted: dict[Key, tuple[bool, int]] = {}
    for _, _, summary in known:
        for one in summary.get("slices") or []:
            before = wanted.get(_key(one), (False, 0))
            wanted[_key(one)] = (before[0] or bool(one.get("flagged")), max(before[1], int(one.get("n") or 0)))
    shown = sorted(sorted(wanted, key=lambda key: wanted[key], reverse=True)[:SHOWN_SLICES])
    labels_of = _labels(shown)
    traces: list[Trace] = []
    for at, run, summary in known:
        found = {_key(one): one for one in summary.get("slices") or []}
        keys = [key for key in shown if key in found]
        if keys:
            trace = dots(run.name, at, [labels_of[key] for key in keys], [found[key]["accuracy"] for key in keys])
            flagged = [bool(found[key].get("flagged")) for key in keys]
            trace["marker"] = {**trace["marker"], "color": ["bad" if flag else colour(at) for flag in flagged],
                               "symbol": ["x" if flag else trace["marker"]["symbol"] for flag in flagged]}
            traces.append({**trace, "flagged": ["yes" if flag else "" for flag in flagged]})
    if not traces:
        return []
    left, small = len(wanted) - len(shown), max(int(s.get("slices_left_out") or 0) for _, _, s in known)
    text = ("Held-out accuracy of parts of the pairs. A red cross differs from the rest even after the correction for "
            "looking at many slices." + (f" {left} more are in the table below." if left else "")
            + (f" {small} with too few pairs are left out." if small else ""))
    numbers = [Numbers(trace["name"], (*dot_numbers("", i, "slice", "accuracy").columns, ("flagged", i, "flagged")))
               for i, trace in enumerate(traces)]
    return [Figure("slices", "Accuracy by slice", text, traces,
                   {"xaxis": axis("share of pairs"), "yaxis": {"autorange": "reversed", "dtick": 1},
                    "height": 90 + len(shown) * (18 + 8 * of),
                    **({"scattermode": "group"} if of > 1 else {})}, numbers)]


def _key(one: Row) -> Key:
    return str(one.get("by")), str(one.get("value"))


def _labels(keys: Sequence[Key]) -> dict[Key, str]:
    """Short, and different for different slices."""
    labels: dict[Key, str] = {}
    for by, value in keys:
        label = "\n".join(textwrap.wrap(f"{by}: {value}", 22, max_lines=2, placeholder=" …"))
        alike = sum(other.split(" #")[0] == label for other in labels.values())
        labels[by, value] = f"{label} #{alike + 1}" if alike else label
    return labels


def slice_tables(known: Known, of: int) -> Markup:
    tables = []
    for _, run, summary in known:
        slices = sorted(summary.get("slices") or [], key=lambda one: (not one.get("flagged"), str(one.get("by"))))
        if slices:
            rows = [[one.get("by"), one.get("value"), plain(one.get("n")), share(one.get("accuracy")),
                     plain(one.get("difference")), plain(one.get("p_corrected")),
                     badge("warning", "flagged") if one.get("flagged") else ""] for one in slices]
            what = named(run, of, f"All {len(slices)} slices")
            head = ["by", "value", "pairs", "accuracy (95\N{NO-BREAK SPACE}%)", "from the rest", "p, corrected", ""]
            tables.append(details(what, table(head, rows, what, ("", "", "n", "n", "n", "n"))))
    return joined(tables)
