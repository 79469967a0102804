"""The top of the page: what was trained on what, and what came of it, in plain words."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_dist.report.markup import Markup, badge, joined, markup
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import NONE, counted, plain, share
from dpo_dist.report.verdict import Note, verdict

WORDS = {"good": "good", "info": "note", "warning": "warning", "error": "alarm"}


def summary_section(runs: Sequence[RunFiles]) -> Section:
    cards = [markup('<article class="run">{}<p>{}</p><p class="note">{}</p>{}{}</article>',
                    markup("<h3>{}</h3>", run.name) if len(runs) > 1 else Markup(""), told(run), run.folder.state(),
                    _key_numbers(run), _notes(verdict(run))) for run in runs]
    return Section("summary", "In short", markup('<div class="runs">{}</div>', joined(cards)), ())


def told(run: RunFiles) -> str:
    """What was trained, on what, and how far, in a sentence or two."""
    config = run.config
    if not config:
        return "No run.json: what was trained is not known."
    loss, optim, train = (config.get(key) or {} for key in ("loss", "optim", "train"))
    model = str((config.get("model") or {}).get("path"))
    sets = [str(one.get("name") or Path(str(one.get("path"))).name)
            for one in (config.get("data") or {}).get("train") or []]
    terms = loss.get("terms") or {}
    sums = " + ".join(term if weight == 1 else f"{weight:g} × {term}" for term, weight in terms.items())
    beta = "" if loss.get("beta") is None else f" (beta {plain(loss['beta'])})"
    pairs = (run.passport.get("train_pairs") or {}).get("count")
    on = f"{plain(pairs)} pairs of {', '.join(sets)}" if pairs is not None else ", ".join(sets)
    steps = f"{counted(run.last_step, 'step')} of {plain(train.get('pairs_per_step'))} pairs"
    return (f"{_short(model)}, trained with the loss {sums or loss.get('name')}{beta} on {on}: {steps}, learning rate "
            f"{plain(optim.get('lr'))}.")


def _short(path: str) -> str:
    """A hub's name as it is; of a path its last two folders."""
    return path if path.count("/") <= 1 else "…/" + "/".join(Path(path).parts[-2:])

ROUNDING = 1e-6                          # below which a figure is 0 but for rounding


def numbers_of(run: RunFiles) -> dict[str, str]:
    """The figures at the top: {what: value}."""
    before, after = (run.held_out[0], run.held_out[-1]) if len(run.held_out) > 1 else ({}, (run.held_out or [{}])[-1])
    last = run.last_evaluation or {}
    sampled = ((last.get("kl") or {}).get("per_answer") or {}).get("value")
    found = {
        "held-out accuracy": share(last.get("accuracy")) if last.get("accuracy") else _change(before, after,
                                                                                              "rewards/accuracies"),
        "held-out margin": _change(before, after, "rewards/margins"), "held-out loss": _change(before, after, "loss"),
        # not the estimate on the data's answers, which a few tokens that became unlikely can send anywhere
        "KL, nats an answer": plain(sampled),
        "chosen answers likelier by, nats a token": plain(after.get("reference/chosen_drift_per_token")),
    }
    if not run.held_out and run.training:
        found = {f"training {name}": plain(run.training[-1].get(key)) for name, key in (
            ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"), ("loss", "loss"))}
    return {name: value for name, value in found.items() if value != NONE}


def _change(before: Row, after: Row, metric: str) -> str:
    first, last = (plain(0 if abs(number(row.get(metric)) or 1) < ROUNDING else row.get(metric))
                   for row in (before, after))
    return last if first == NONE else f"{first} → {last}"


def _key_numbers(run: RunFiles) -> Markup:
    return markup('<dl class="key">{}</dl>', joined(markup("<div><dt>{}</dt><dd>{}</dd></div>", name, value)
                                                    for name, value in numbers_of(run).items()))


def _notes(notes: Sequence[Note]) -> Markup:
    return markup('<ul class="verdict">{}</ul>', joined(markup("<li>{} {}</li>", badge(level, WORDS[level]), words)
                                                        for level, words in notes))
