"""What sweep.json says: a table of runs, the best one with its command, and plots over what was swept."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dpo_dist.report.figures import COLOURS, SYMBOLS, Figure, Numbers, Trace, axis, colour, grid
from dpo_dist.report.markup import NOTHING, Markup, badge, joined, markup, paragraph, table
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import counted, plain
from dpo_dist.runtime.json_files import needed_object

COLUMNS = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "reference/kl_per_token": "KL estimate",
           "reference/chosen_drift_per_token": "chosen drift", "loss": "loss"}
PLOTS = {"rewards/accuracies": "share of held-out pairs", "rewards/margins": "beta × nats",
         "reference/kl_per_token": "nats a token", "reference/chosen_drift_per_token": "nats a token"}
TEXTS = {"rewards/accuracies": "How many held-out pairs are right.",
         "rewards/margins": "Margins grow with beta itself: compare runs of one beta.",
         "reference/kl_per_token": "How far each run went, estimated on the data's answers.",
         "reference/chosen_drift_per_token": "Below 0 the policy makes even the chosen answers less likely."}


@dataclass(frozen=True)
class Job:
    """A run of the sweep, by sweep.json."""

    name: str
    swept: Row
    done: bool
    message: str
    metrics: dict[str, float]
    run: RunFiles

    def number(self, key: str) -> float | None:
        value = self.swept.get(key)
        return number(value) if isinstance(value, int | float) else None


class Sweep:
    """A sweep's folder. A run's own folder lies directly in it, by whatever way the sweep's was reached."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content: Row = needed_object(folder / "sweep.json", "the same sweep again writes it anew")

    @cached_property
    def jobs(self) -> list[Job]:
        return [self._job(entry) for entry in self.content["jobs"]]

    def _job(self, entry: Row) -> Job:
        name = " ".join(f"{key}={_word(value)}" for key, value in entry["swept"].items())
        metrics = {key: found for key, value in entry["metrics"].items() if (found := number(value)) is not None}
        folder = self.folder / Path(entry["run_dir"]).name
        return Job(name, entry["swept"], entry["done"], entry["message"], metrics, RunFiles(folder, name))

    @property
    def best(self) -> Row | None:
        return self.content.get("best")

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for job in self.jobs for key in job.swept))

    def line_of(self, job: Job, besides: str) -> str:
        """What a job differs in from others, `besides` a key."""
        return " ".join(f"{key}={_word(job.swept.get(key))}" for key in self.keys if key != besides) or "all runs"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def best_section(sweep: Sweep) -> Section:
    jobs, best = sweep.jobs, sweep.best
    failed = [job for job in jobs if not job.done]
    way = "lower" if sweep.content["direction"] == "minimize" else "higher"
    told = paragraph(f"{counted(len(jobs), 'run')}, {len(jobs) - len(failed)} of them done, compared on held-out pairs "
                     f"by {sweep.content['objective']}: the {way} the better.")
    if best is None:
        words = paragraph("No run has a result yet.")
    else:
        name = " ".join(f"{key}={_word(value)}" for key, value in best["swept"].items())
        words = markup('<p>{} Best: <strong>{}</strong>, in <code>{}</code>. To train the same again:</p><pre>{}</pre>',
                       badge("good", "best"), name, best["run_dir"], best["command"])
    left = markup("<h3>Not done</h3><ul>{}</ul>", joined(
        markup("<li><strong>{}</strong>: {}</li>", job.name, job.message) for job in failed)) if failed else NOTHING
    return Section("summary", "In short", joined([told, words, left]), ())


def runs_section(sweep: Sweep) -> Section:
    names = [name for name in COLUMNS if any(name in job.metrics for job in sweep.jobs)]
    rows = []
    for job in sweep.jobs:
        is_best = sweep.best is not None and sweep.best["swept"] == job.swept
        state = badge("good", "best") if is_best else NOTHING if job.done else badge("error", "failed")
        rows.append([*(_word(job.swept.get(key)) for key in sweep.keys),
                     *(plain(job.metrics.get(name)) for name in names), state, _link(sweep, job)])
    head = [*sweep.keys, *(COLUMNS[name] for name in names), "", "its report"]
    return Section("runs", "All runs", table(head, rows, "All runs", ["n"] * (len(head) - 2)), ())


def _link(sweep: Sweep, job: Job) -> Markup:
    """Relative: the sweep's folder may be moved or sent as a whole."""
    if not job.run.folder.report_html.is_file():
        return markup('<span class="note">none</span>')
    where = job.run.folder.report_html.relative_to(sweep.folder)
    return markup('<a href="{}">open</a>', quote(str(where)))


def swept_section(sweep: Sweep) -> Section | None:
    """Each metric over the learning rate (else the first swept number), a line for each other value. Where the rest
    takes more values than there are colours, as in a random search: over each number that is swept, points alone. None
    where no number is swept."""
    numbers = [key for key in sweep.keys if all(job.number(key) is not None for job in sweep.jobs)]
    if not numbers:
        return None
    x = "optim.lr" if "optim.lr" in numbers else numbers[0]
    names = [name for name in PLOTS if any(name in job.metrics for job in sweep.jobs)]
    if len({sweep.line_of(job, x) for job in sweep.jobs}) <= COLOURS:
        figures = [_figure(sweep, name, x, True) for name in names]
    else:
        figures = [_figure(sweep, name, key, False) for name in names for key in numbers]
    return Section("swept", "Over what was swept", grid(figures), figures)


def _figure(sweep: Sweep, name: str, x: str, with_lines: bool) -> Figure:
    lines: dict[str, list[Job]] = {}
    for job in sweep.jobs:
        if name in job.metrics:
            lines.setdefault(sweep.line_of(job, x) if with_lines else "all runs", []).append(job)
    traces: list[Trace] = []
    for at, (line, jobs) in enumerate(lines.items()):
        jobs = sorted(jobs, key=lambda job: job.number(x) or 0.0)
        traces.append({"name": line, "mode": "lines+markers" if with_lines else "markers",
                       "x": [job.number(x) for job in jobs], "y": [job.metrics[name] for job in jobs],
                       "text": [job.name for job in jobs], "line": {"color": colour(at), "width": 1.5},
                       "marker": {"size": 9, "symbol": SYMBOLS[at % len(SYMBOLS)], "color": colour(at)},
                       "hovertemplate": "%{text}<br>%{y:.4g}<extra></extra>"})
    values = [value for job in sweep.jobs if (value := job.number(x)) is not None]
    logarithmic = min(values) > 0 and max(values) > 3 * min(values)
    title = COLUMNS[name][0].upper() + COLUMNS[name][1:]
    return Figure(f"swept-{name.rpartition('/')[2]}-{x}".replace(".", "-"), title, TEXTS[name], traces,
                  {"xaxis": axis(x, **({"type": "log"} if logarithmic else {}), **_ticks(values)),
                   "yaxis": axis(PLOTS[name])},
                  [Numbers(trace["name"], (("run", i, "text"), (x, i, "x"), (COLUMNS[name], i, "y")))
                   for i, trace in enumerate(traces)])


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """A tick at each value where they are few."""
    found = sorted(set(values))
    return {"tickvals": found, "ticktext": [f"{value:g}" for value in found]} if len(found) <= 6 else {}
