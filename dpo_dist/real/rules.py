"""What a good answer is here, in rules that a program checks. An answer's rating is the number of rules that it obeys.

The model obeys each of them now and then, so that its own answers to a prompt differ in rating.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dpo_dist.real.answers import Answer
from dpo_dist.real.prompts import KINDS

MOST_SENTENCES = 3
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


def keeps_to_the_topic(answer: Answer) -> bool:
    """It uses a word of the question's topic; where the question has none, any answer does."""
    topic = content_words(answer.prompt)
    return bool(answer.text) and (not topic or bool(topic & content_words(answer.text)))


def is_not_about_itself(answer: Answer) -> bool:
    """It does not say I, me, my or mine."""
    return bool(answer.text) and not re.search(r"\b(I|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself)\b", answer.text)


def content_words(text: str) -> set[str]:
    """The text's words of three letters and more, in lower case and without the ending of a plural or a verb, but for
    those that questions on any topic are made of."""
    return {_stem(word) for word in re.findall(r"[a-z]{3,}", text.lower())} - FORM_WORDS


def _stem(word: str) -> str:
    return re.sub(r"(?<=\w{3})(ies|ing|es|ed|s|e|y)$", "", word)


FORM_WORDS = {_stem(word) for kind in KINDS.values() for form in kind.forms
              for word in re.findall(r"[a-z]{3,}", form.lower())}
FORM_WORDS |= {_stem(word) for word in ("the", "and", "with", "that", "this", "you", "your", "our", "are", "has",
                                        "have", "was", "not", "too", "much", "many", "long", "again")}

RULES: Mapping[str, Callable[[Answer], bool]] = {
    "ends by itself within three sentences": is_brief,
    "one paragraph, no list, no markup": is_plain,
    "uses a word of the question's topic": keeps_to_the_topic,
    "does not speak of itself (no I, me, my)": is_not_about_itself,
}


def rating(answer: Answer) -> int:
    return sum(rule(answer) for rule in RULES.values())


def rated_row(answers: list[Answer]) -> dict[str, Any] | None:
    """The best and the worst of the answers to one prompt as a row of the format `ratings`; None where they are rated
    alike, or one is empty."""
    best, worst = max(answers, key=rating), min(answers, key=rating)
    if rating(best) == rating(worst) or not (best.text and worst.text):
        return None
    return {"prompt": best.prompt, "responses": [best.text, worst.text], "ratings": [rating(best), rating(worst)]}
