"""What a good answer is here, in rules that a program checks. An answer's rating is the number of rules that it obeys.

The model obeys each of them now and then, so that its own answers to a prompt differ in rating.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dpo_dist.real.answers import Answer

MOST_SENTENCES, MOST_WORDS_IN_THE_FIRST = 3, 12
_MARKUP = re.compile(r"\n|\*\*|`|^\s*(#|[-*•]|\d+[.)])\s|\S\s[-*•]\s\S.*\s[-*•]\s\S|[:;.]\s\d[.)]\s")
# An end of a sentence: not the point of 3.5, of an initial or of a common abbreviation.
_SENTENCE_END = re.compile(r"""(?<!\b[A-Z])(?<!\b[ei]\.[ge])(?<!\b[DMS][rt])(?<!\bMrs)[.!?…]+["')\]’”]*(?=\s|$)""")


def sentences(text: str) -> list[str]:
    """The text's sentences, the last of which may lack its end."""
    cut, found = 0, []
    for end in _SENTENCE_END.finditer(text):
        found.append(text[cut:end.end()].strip())
        cut = end.end()
    return [sentence for sentence in [*found, text[cut:].strip()] if sentence]


def is_brief(answer: Answer) -> bool:
    """It ends by itself, after one to three sentences."""
    return answer.ended and 1 <= len(sentences(answer.text)) <= MOST_SENTENCES


def is_plain(answer: Answer) -> bool:
    """It is one paragraph, without list, heading, bold or code."""
    return bool(answer.text) and not _MARKUP.search(answer.text)


def opens_shortly(answer: Answer) -> bool:
    """Its first sentence is whole, and has twelve words at most."""
    end = _SENTENCE_END.search(answer.text)
    return end is not None and len(answer.text[:end.end()].split()) <= MOST_WORDS_IN_THE_FIRST


def speaks_to_the_reader(answer: Answer) -> bool:
    """It says you or your."""
    return bool(re.search(r"\b(you|your|yours|yourself|yourselves)\b", answer.text, re.IGNORECASE))


RULES: Mapping[str, Callable[[Answer], bool]] = {
    "ends by itself within three sentences": is_brief,
    "one paragraph, no list, no markup": is_plain,
    "a first sentence of at most 12 words": opens_shortly,
    "speaks to the reader (you, your)": speaks_to_the_reader,
}


def rating(answer: Answer) -> int:
    return sum(rule(answer) for rule in RULES.values())


def rated_row(prompt: str, answers: list[Answer]) -> dict[str, Any] | None:
    """The best and the worst answer as a row of the format `ratings`; None where there is none."""
    best, worst = max(answers, key=rating), min(answers, key=rating)
    if rating(best) == rating(worst) or not (best.text and worst.text):
        return None
    return {"prompt": prompt, "responses": [best.text, worst.text], "ratings": [rating(best), rating(worst)]}
