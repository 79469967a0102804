"""Answers to the same held-out prompts before and after training, side by side."""
from __future__ import annotations

from collections.abc import Sequence

from dpo_dist.report.markup import NOTHING, Markup, badge, details, joined, markup, paragraph, table
from dpo_dist.report.page import Section
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import NONE, counted, percent, plain

FIRST, MOST = 5, 40                      # prompts shown at once, and at all
CHARACTERS = 1500                        # of a text
FIGURES = {"answers": "answers", "tokens_mean": "tokens, mean", "ended_share": "ended by themselves",
           "repetition": "repetition"}


def answers_section(runs: Sequence[RunFiles]) -> Section | None:
    """None where no run answered prompts."""
    parts = [part for part in (_figures(runs), _side_by_side(runs)) if part]
    if not parts:
        return None
    intro = paragraph("The same held-out prompts at each evaluation. Look for answers that grow, repeat themselves or "
                      "never end: figures rarely show it first.")
    return Section("answers", "Answers, before and after", joined([intro, *parts]), ())


def _figures(runs: Sequence[RunFiles]) -> Markup:
    """generations.json as a table."""
    columns = [(f"{run.name}, {when}" if len(runs) > 1 else when, run.generations[when])
               for run in runs if run.generations for when in ("before", "after") if run.generations.get(when)]
    if not columns:
        return NOTHING
    rows = [[what, *(_figure(found, name) for _, found in columns)] for name, what in FIGURES.items()
            if any(name in found for _, found in columns)]
    return table(["", *(name for name, _ in columns)], rows, "Length and repetition of answers",
                 ("", *["n"] * len(columns)))


def _figure(found: Row, name: str) -> str:
    if name == "tokens_mean" and number(found.get("tokens_low")) is not None:
        return f"{plain(found.get(name))} ({plain(found.get('tokens_low'))} to {plain(found.get('tokens_high'))})"
    return percent(found.get(name)) if name in ("ended_share", "repetition") else plain(found.get(name))


def repetition(completion: object) -> float | None:
    """The share of four-word sequences that were there before in the same answer; None where it is too short."""
    words: Sequence[object] = completion if isinstance(completion, list) else str(completion).split()
    fours = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(fours)) / len(fours) if len(fours) > 3 else None


def _side_by_side(runs: Sequence[RunFiles]) -> Markup:
    columns: list[tuple[str, dict[str, Row]]] = []
    for at, run in enumerate(runs):
        steps = sorted({row["step"] for row in run.samples if isinstance(row.get("step"), int)})
        # the first run's answers from before training stand for all: the others start from there as well, or say so
        for step in ([steps[0], steps[-1]] if len(steps) > 1 and at == 0 else steps[-1:]):
            name = f"step {step}"
            columns.append((f"{run.name}, {name}" if len(runs) > 1 else name, {
                _text(row.get("prompt")): row for row in run.samples if row.get("step") == step}))
    if not columns:
        return NOTHING
    prompts = list(dict.fromkeys(prompt for _, rows in columns for prompt in rows))
    shown = [_prompt(prompt, [(name, rows.get(prompt)) for name, rows in columns]) for prompt in prompts[:MOST]]
    more = details(counted(len(shown) - FIRST, "more prompt"), joined(shown[FIRST:])) if len(shown) > FIRST else NOTHING
    left = len(prompts) - MOST
    note = paragraph(f"{left:,} more prompts are in samples.jsonl.", "note") if left > 0 else NOTHING
    return joined([*shown[:FIRST], more, note])


def _prompt(prompt: str, columns: Sequence[tuple[str, Row | None]]) -> Markup:
    answers = joined(markup('<div class="answer"><h4>{}</h4>{}</div>', name, _answer(row)) for name, row in columns)
    return markup('<article class="sample"><div class="prompt">{}</div><div class="answers">{}</div></article>',
                  _cut(prompt), answers)


def _answer(row: Row | None) -> Markup:
    if row is None:
        return paragraph("not asked", "note")
    again = repetition(row.get("completion"))
    facts = [counted(int(tokens), "token")] if (tokens := number(row.get("tokens"))) is not None else []
    facts += [f"{percent(again)} repeated"] if again is not None and again > 0.05 else []
    ended = NOTHING if row.get("ended", True) else badge("warning", "cut off")
    return markup('<p class="text">{}</p><p class="note">{} {}</p>', _cut(_text(row.get("completion"))),
                  ", ".join(facts) or NONE, ended)


def _text(value: object) -> str:
    """A text, or token ids where the run has no tokenizer."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} characters more)"
