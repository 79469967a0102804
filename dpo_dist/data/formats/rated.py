"""Formats of several answers to a prompt with a rating each: all pairs of different ratings, a tie where they agree."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from dpo_dist.data.fields import Fields, Unfit, first_of, need, number, number_or_none
from dpo_dist.data.formats.format import DataRow, Outcome, Tie
from dpo_dist.data.formats.free import joined, of_answer
from dpo_dist.data.formats.judgment import judgment_of
from dpo_dist.data.formats.pairs import pair, preference


@dataclass(frozen=True)
class Answer:
    content: Any                             # text or messages
    rating: float
    about: Fields = field(default_factory=dict)          # what else the row says of it: model, version, aspects, ...


def ratings(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """A prompt and rated responses: a row for each pair with different ratings, strength = their difference; a tie for
    equal ones.

    `responses` (texts or messages) with `ratings` or `scores` beside it, or a list of {"response" | "content" | "text",
    "rating" | "score"}. What else such an object has is kept of that answer; `models` and `versions` beside too.
    """
    key = "instruction" if "instruction" in fields and "prompt" not in fields else "prompt"
    need(fields, key)
    yield from _pairs(fields, fields[key], _rated(fields), where, source)


def ultrafeedback(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """{"instruction", "completions": [{"response", "overall_score", "model", "annotations"}]}: UltraFeedback's own; its
    binarized rows as well."""
    if "completions" not in fields and "chosen" in fields:
        yield from preference(fields, where, source)
        return
    need(fields, "instruction", "completions")
    yield from _pairs(fields, fields["instruction"], _rated(fields), where, source)


def distilabel(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """{"instruction" | "messages", "generations", "ratings", "generation_models"}. Generations that failed, or have no
    rating, are null there and left out. Rows that have only its `chosen` and `rejected` as well."""
    if "generations" not in fields and "chosen" in fields:
        yield from preference(fields, where, source)
        return
    need(fields, "generations", "ratings")
    generations, values = fields["generations"], fields["ratings"]
    if not isinstance(generations, list) or not isinstance(values, list) or len(generations) != len(values):
        raise Unfit("ratings and generations differ in number")
    answers = [Answer(text, number(rating, "rating"), about)
               for text, rating, about in zip(generations, values, _beside(fields, len(generations)), strict=True)
               if text is not None and rating is not None]
    if len(answers) < 2:
        raise Unfit("fewer than two generations have a rating")
    key = first_of(fields, "instruction", "messages", "prompt", "conversation")
    system = "system_prompt" if isinstance(fields.get("system_prompt"), str) else "system"
    yield from _pairs(fields, fields[key], answers, where, source, system)


def nemo_rl(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """{"context": [...], "completions": [{"rank", "completion": [...]}]}: the lower the rank the better."""
    need(fields, "context", "completions")
    completions = fields["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise Unfit("completions is not a list of two or more")
    if not all(isinstance(c, dict) and "completion" in c and "rank" in c for c in completions):
        raise Unfit("a completion has no rank or no completion", repr(completions)[:60])
    answers = [Answer(c["completion"], -number(c["rank"], "rank"), _rest(c, "completion", "rank")) for c in completions]
    yield from _pairs(fields, fields["context"], answers, where, source, ranked=True)


def _pairs(fields: Fields, prompt: Any, answers: list[Answer], where: str, source: str, system: str = "system",
           ranked: bool = False) -> Iterator[Outcome]:
    judgment = judgment_of(fields)

    def row(better: Answer, worse: Answer) -> DataRow:
        record = joined(judgment["record"], _record("chosen", better, ranked), _record("rejected", worse, ranked))
        return pair(prompt, better.content, worse.content, fields, where, source, system,
                    **{**judgment, "strength": better.rating - worse.rating, "record": record})

    for a, b in combinations(answers, 2):
        if a.rating == b.rating:
            yield Tie("tie", partial(row, a, b))
        else:
            yield row(a, b) if a.rating > b.rating else row(b, a)


def _record(side: str, answer: Answer, ranked: bool) -> dict[str, Any]:
    rating = {f"{side}_rank": -answer.rating} if ranked else {f"{side}_rating": answer.rating}
    return joined(of_answer(side, answer.about), rating)


def _beside(fields: Fields, answers: int) -> list[Fields]:
    """What lists beside the answers say of each."""
    found: list[Fields] = [{} for _ in range(answers)]
    for noun, names in (("model", ("models", "generation_models", "generators")), ("version", ("versions",))):
        held = next((fields[name] for name in names if name in fields), None)
        if isinstance(held, list) and len(held) == answers:
            for about, value in zip(found, held, strict=True):
                about[noun] = value
    return found


def _rest(answer: Fields, *read: str) -> Fields:
    """What an answer's own object says beside the fields that are read."""
    return {key: value for key, value in answer.items() if key not in read and value is not None}


def _rated(fields: Fields) -> list[Answer]:
    responses = fields.get("responses", fields.get("completions"))
    if not isinstance(responses, list) or len(responses) < 2:
        raise Unfit("responses is not a list of two or more")
    beside = next((fields[k] for k in ("ratings", "scores") if k in fields), None)
    if beside is not None:
        if not isinstance(beside, list) or len(beside) != len(responses):
            raise Unfit("ratings and responses differ in number")
        return [Answer(answer, number(rating, "rating"), about)
                for answer, rating, about in zip(responses, beside, _beside(fields, len(responses)), strict=True)]
    out = []
    for response in responses:
        held = response if isinstance(response, dict) else {}
        answer = next((held[k] for k in ("response", "content", "text") if k in held), None)
        if answer is None:
            raise Unfit("a response has no text, or there are no ratings beside the responses", repr(response)[:60])
        read_as = next((k for k in ("rating", "score", "overall_score", "fine-grained_score") if k in held), "")
        aspects = _aspects(held.get("annotations"))
        out.append(Answer(answer, number(held.get(read_as), "rating"), {
            **_rest(held, "response", "content", "text", "annotations", read_as),
            **({"aspects": aspects} if aspects else {})}))
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
