"""Folders → report.html, and beside it report.json with the numbers behind the page."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_dist.report.answers import answers_section
from dpo_dist.report.audit_findings import audit_section
from dpo_dist.report.curves import CURVES, curve_figures, length_figure, thinned_note
from dpo_dist.report.data_map import pairs_section
from dpo_dist.report.figures import grid
from dpo_dist.report.frontier import frontier_section
from dpo_dist.report.held_out import facts_of, held_out_section
from dpo_dist.report.markup import Markup, joined, paragraph
from dpo_dist.report.page import Section, page
from dpo_dist.report.provenance import provenance_section
from dpo_dist.report.run_files import RunFiles, read_runs
from dpo_dist.report.summary import numbers_of, summary_section, told
from dpo_dist.report.sweep import Sweep, best_section, runs_section, swept_section
from dpo_dist.report.verdict import verdict
from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.run_dir import RunDir

MOST_LINES = 12                          # runs of a sweep whose curves are drawn together


def write_report(folders: Sequence[str | Path], to: Path | None = None) -> Path:
    """The file that was written: `to`, else report.html in the folder of a single run or sweep, or in the current one
    for several. UserError for a folder that holds neither."""
    first = Path(folders[0])
    is_sweep = len(folders) == 1 and (first / "sweep.json").is_file()
    title, sections, numbers = _of_sweep(Sweep(first)) if is_sweep else _of_runs(read_runs(folders))
    to = to or (RunDir(first).report_html if len(folders) == 1 else Path("report.html"))
    whole = page(title, _note(is_sweep, len(folders)), sections)
    figures = {figure.key: figure.values() for section in sections for figure in section.figures}
    to.parent.mkdir(parents=True, exist_ok=True)
    # texts of samples may hold halves of characters, which no encoding has
    write_atomic(to, whole.encode("utf-8", "replace"))
    write_atomic(to.with_suffix(".json"), json.dumps({"title": title, **numbers, "plots": figures}) + "\n")
    return to


def _note(is_sweep: bool, folders: int) -> str:
    what = "the sweep's folder" if is_sweep else "the run's folder" if folders == 1 else "the runs' folders"
    return f"Made by dpo-dist report from the files in {what}; it needs no network."


def _of_runs(runs: Sequence[RunFiles]) -> tuple[str, list[Section], dict[str, Any]]:
    figures = [*curve_figures(runs), *length_figure(runs)]
    found = [
        summary_section(runs),
        _curves(figures, thinned_note(runs)),
        held_out_section(runs),
        frontier_section(runs),
        answers_section(runs),
        audit_section(runs),
        pairs_section(runs),
        provenance_section(runs),
    ]
    numbers = {"runs": [{"name": run.name, "folder": str(run.path), "state": run.folder.state(), "told": told(run),
                         "numbers": numbers_of(run) | facts_of(run),
                         "verdict": [{"level": level, "words": words} for level, words in verdict(run)]}
                        for run in runs]}
    return " beside ".join(run.name for run in runs), [section for section in found if section is not None], numbers


def _of_sweep(sweep: Sweep) -> tuple[str, list[Section], dict[str, Any]]:
    done = [job for job in sweep.jobs if job.done]
    runs = [job.run for job in done]
    lines = {job.run.name: sweep.line_of(job, "loss.beta") for job in done} if "loss.beta" in sweep.keys else None
    curves = [curve for curve in CURVES if curve.key in ("loss", "accuracy", "margin", "drift", "kl")]
    few = runs[:MOST_LINES]
    note = f"Of {len(runs)} runs the first {MOST_LINES} are drawn." if len(runs) > MOST_LINES else ""
    found = [
        best_section(sweep),
        runs_section(sweep),
        swept_section(sweep),
        frontier_section(runs, lines) if len(runs) > 1 else None,
        _curves(curve_figures(few, curves, held_out_only=len(few) > 1), note),
    ]
    title = f"{sweep.folder.resolve().name}: {len(sweep.jobs)} runs"
    return title, [section for section in found if section is not None], {"sweep": sweep.content}


def _curves(figures: Sequence[Any], note: str) -> Section | None:
    if not figures:
        return None
    notes = [paragraph(note, "note")] if note else [Markup("")]
    return Section("curves", "Over training", joined([*notes, grid(figures)]), figures)
