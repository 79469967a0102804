"""A seeded, clean preference set: English, every prompt asked once, and nothing by which chosen is told from rejected.

Prompts and answers are drawn from sentences with gaps (clean_words.py). Answers are of several sentences, some with
lists, bold words, headings, openings or refusals, in chosen and rejected alike: both are drawn from the same
distribution, so length, style, order and model say nothing about the judgment.
"""
from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import clean_words as words

MODELS = ("alpha-7b", "beta-13b", "gamma-8b", "delta-70b")
GAP = re.compile(r"{(\w+?)\d?(:cap)?}")
FILLED = {name: tuple(" ".join(filler.split()) for filler in text.split("|")) for name, text in words.GAPS.items()}
MARKUP = {"list": 0.12, "bold": 0.08, "heading": 0.05, "opening": 0.3, "refusal": 0.02}      # shares of all answers


def clean_rows(n: int, seed: int = 0, sentences: tuple[int, int] = (4, 9)) -> list[dict[str, Any]]:
    """n rows {"prompt", "chosen", "rejected", "chosen_model", "rejected_model"}; rows of another seed have other
    prompts, and answers have from `sentences[0]` to `sentences[1]` sentences."""
    r, seen = random.Random(f"clean {seed}"), set()
    rows = []
    while len(rows) < n:
        prompt = question(r)
        if prompt in seen:
            continue
        seen.add(prompt)
        rows.append({"prompt": prompt, "chosen": answer(r, sentences), "rejected": answer(r, sentences),
                     "chosen_model": r.choice(MODELS), "rejected_model": r.choice(MODELS)})
    return rows


def question(r: random.Random) -> str:
    """A prompt of three or four sentences."""
    parts = [filled(r.choice(words.CONTEXTS), r), filled(r.choice(words.ASKS), r), filled(r.choice(words.LIMITS), r)]
    if r.random() < 0.3:
        parts.insert(1, filled(r.choice(words.CONTEXTS), r))
    return " ".join(parts)


def answer(r: random.Random, sentences: tuple[int, int] = (4, 9)) -> str:
    """An answer, with markup now and then."""
    said = [filled(r.choice(words.SENTENCES), r) for _ in range(r.randint(*sentences))]
    drawn = {kind for kind, share in MARKUP.items() if r.random() < share}
    if "bold" in drawn:
        first, _, rest = said[1].partition(" ")
        said[1] = f"**{first}** {rest}"
    if "list" in drawn:
        at = r.randrange(1, len(said) - 1)
        said[at:at + 3] = ["\n" + "\n".join(f"{'-' if 'bold' in drawn else f'{i}.'} {line}"
                                            for i, line in enumerate(said[at:at + 3], 1)) + "\n"]
    if "opening" in drawn:
        said.insert(0, filled(r.choice(words.OPENINGS), r))
    if "refusal" in drawn:
        said.insert(0, filled(r.choice(words.REFUSALS), r))
    if "heading" in drawn:
        said.insert(0, f"## {r.choice(words.HEADINGS)}\n\n")
    return re.sub(r" ?\n ?", "\n", " ".join(said)).strip()


def filled(sentence: str, r: random.Random) -> str:
    """The sentence with its gaps filled, never twice with the same filler."""
    out, used = [], set()
    for literal, gap, capital in pieces(sentence):
        out.append(literal)
        if gap:
            filler = r.choice(FILLED[gap])
            while filler in used:
                filler = r.choice(FILLED[gap])
            used.add(filler)
            out.append(filler[0].upper() + filler[1:] if capital else filler)
    return "".join(out)


@cache
def pieces(sentence: str) -> tuple[tuple[str, str, bool], ...]:
    """(text, gap after it or "", whether it is filled with a capital letter) of a sentence."""
    return tuple(_pieces(sentence))


def _pieces(sentence: str) -> Iterator[tuple[str, str, bool]]:
    at = 0
    for gap in GAP.finditer(sentence):
        yield sentence[at:gap.start()], gap[1], bool(gap[2])
        at = gap.end()
    yield sentence[at:], "", False
