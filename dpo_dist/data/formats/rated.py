"""Formats of several answers to a prompt with a rating each: all pairs of different ratings, a tie where they agree."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dpo_dist.data.fields import Fields, Unfit, first_of, need, number, number_or_none
from dpo_dist.data.formats.format import DataRow
from dpo_dist.data.formats.judgment import judgment_of, known
from dpo_dist.data.formats.pairs import pair, preference


@dataclass(frozen=True)
class Answer:
    content: Any                             # text or messages
    rating: float
    model: str | None = None
    aspects: dict[str, float] = field(default_factory=dict)          # {name of a criterion: rating}


def ratings(fields: Fields, where: str, source: str) -> Iterator[DataRow | None]:
    """A prompt and rated responses: a row for each pair with different ratings, strength = their difference; None for a
    tie.

    `responses` (texts or messages) with `ratings` or `scores` beside it, or a list of {"response" | "content" | "text",
    "rating" | "score"}.
    """
    key = "instruction" if "instruction" in fields and "prompt" not in fields else "prompt"
    need(fields, key)
    yield from _pairs(fields, fields[key], _rated(fields), where, source)


def ultrafeedback(fields: Fields, where: str, source: str) -> Iterator[DataRow | None]:
    """{"instruction", "completions": [{"response", "overall_score", "model", "annotations"}]}: UltraFeedback's own; its
    binarized rows as well."""
    if "completions" not in fields and "chosen" in fields:
        yield from preference(fields, where, source)
        return
    need(fields, "instruction", "completions")
    yield from _pairs(fields, fields["instruction"], _rated(fields), where, source)


def distilabel(fields: Fields, where: str, source: str) -> Iterator[DataRow | None]:
    """{"instruction" | "messages", "generations", "ratings", "generation_models"}. Generations that failed, or have no
    rating, are null there and left out. Rows that have only its `chosen` and `rejected` as well."""
    if "generations" not in fields and "chosen" in fields:
        yield from preference(fields, where, source)
        return
    need(fields, "generations", "ratings")
    generations, values = fields["generations"], fields["ratings"]
    if not isinstance(generations, list) or not isinstance(values, list) or len(generations) != len(values):
        raise Unfit("ratings and generations differ in number")
    models = fields.get("generation_models")
    if not isinstance(models, list) or len(models) != len(generations):
        models = [None] * len(generations)
    answers = [Answer(text, number(rating, "rating"), model)
               for text, rating, model in zip(generations, values, models, strict=True)
               if text is not None and rating is not None]
    if len(answers) < 2:
        raise Unfit("fewer than two generations have a rating")
    key = first_of(fields, "instruction", "messages", "prompt", "conversation")
    system = "system_prompt" if isinstance(fields.get("system_prompt"), str) else "system"
    yield from _pairs(fields, fields[key], answers, where, source, system)


def nemo_rl(fields: Fields, where: str, source: str) -> Iterator[DataRow | None]:
    """{"context": [...], "completions": [{"rank", "completion": [...]}]}: the lower the rank the better."""
    need(fields, "context", "completions")
    completions = fields["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise Unfit("completions is not a list of two or more")
    if not all(isinstance(c, dict) and "completion" in c and "rank" in c for c in completions):
        raise Unfit("a completion has no rank or no completion", repr(completions)[:60])
    answers = [Answer(c["completion"], -number(c["rank"], "rank")) for c in completions]
    yield from _pairs(fields, fields["context"], answers, where, source, ranked=True)


def _pairs(fields: Fields, prompt: Any, answers: list[Answer], where: str, source: str, system: str = "system",
           ranked: bool = False) -> Iterator[DataRow | None]:
    judgment = judgment_of(fields)
    for a, b in combinations(answers, 2):
        if a.rating == b.rating:
            yield None
            continue
        better, worse = (a, b) if a.rating > b.rating else (b, a)
        record = judgment["record"] | _record("chosen", better, ranked) | _record("rejected", worse, ranked)
        yield pair(prompt, better.content, worse.content, fields, where, source, system,
                   **{**judgment, "strength": better.rating - worse.rating, "record": record})


def _record(side: str, answer: Answer, ranked: bool) -> dict[str, Any]:
    rating = {f"{side}_rank": -answer.rating} if ranked else {f"{side}_rating": answer.rating}
    return rating | known({f"{side}_model": answer.model, f"{side}_aspects": answer.aspects or None})


def _rated(fields: Fields) -> list[Answer]:
    responses = fields.get("responses", fields.get("completions"))
    if not isinstance(responses, list) or len(responses) < 2:
        raise Unfit("responses is not a list of two or more")
    beside = next((fields[k] for k in ("ratings", "scores") if k in fields), None)
    if beside is not None:
        if not isinstance(beside, list) or len(beside) != len(responses):
            raise Unfit("ratings and responses differ in number")
        return [Answer(answer, number(rating, "rating")) for answer, rating in zip(responses, beside, strict=True)]
    out = []
    for response in responses:
        held = response if isinstance(response, dict) else {}
        answer = next((held[k] for k in ("response", "content", "text") if k in held), None)
        if answer is None:
            raise Unfit("a response has no text, or there are no ratings beside the responses", repr(response)[:60])
        rating = next((held[k] for k in ("rating", "score", "overall_score", "fine-grained_score") if k in held), None)
        model = held.get("model")
        out.append(Answer(answer, number(rating, "rating"), model if isinstance(model, str) else None,
                          _aspects(held.get("annotations"))))
    return out


def _aspects(annotations: Any) -> dict[str, float]:
    """UltraFeedback's {"honesty": {"Rating": "4", "Rationale": "..."}}, also a list of such, → {"honesty": 4.0}."""
    out = {}
    for name, held in (annotations if isinstance(annotations, dict) else {}).items():
        first = held[0] if isinstance(held, list) and held else held
        rating = number_or_none(first.get("Rating") if isinstance(first, dict) else first)
        if rating is not None:
            out[name] = rating
    return out
