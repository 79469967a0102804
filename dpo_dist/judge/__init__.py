"""A judge from outside, a command or a URL, that compares two answers to a prompt or scores one. No torch here.

It is told JSON objects, and tells one for each, in any order, found again by `id`:

    to compare   {"id", "prompt", "a", "b"}    →  {"id", "winner": "a" | "b" | "tie"}  or  {"id", "score_a", "score_b"}
    to score     {"id", "prompt", "answer"}    →  {"id", "score"}

A command gets them as lines on its stdin and writes lines to its stdout (command.py). A URL gets a POST of
{"rows": [...]} and answers with a list, or with {"rows": [...]} (url.py). Texts are strings, or lists of token ids
where the run has no tokenizer.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.judge.command import Command
from dpo_dist.judge.url import Url

Text = str | list[int]
WINS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, in the order in which the judge sees them."""

    prompt: Text
    a: Text
    b: Text


@dataclass(frozen=True)
class Judge:
    """Asks, and checks what is answered. `key`: where the configuration names it, for messages."""

    ask: Callable[[Sequence[Mapping[str, Any]]], Iterable[Any]]      # rows → the judge's objects, as they come
    key: str
    name: str

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """For each comparison 1 where the judge prefers a, 0 where b, 0.5 where neither. UserError where it fails."""
        return self._answers([{"prompt": one.prompt, "a": one.a, "b": one.b} for one in comparisons], _preference,
                             '"winner": "a", "b" or "tie", or with numbers "score_a" and "score_b"')

    def score(self, prompts: Sequence[Text], answers: Sequence[Text]) -> list[float]:
        """The judge's number for each answer to its prompt, higher is better. UserError where it fails."""
        return self._answers([{"prompt": prompt, "answer": answer}
                              for prompt, answer in zip(prompts, answers, strict=True)], _score, 'a number "score"')

    def _answers(self, rows: list[dict[str, Any]], read: Callable[[Mapping[str, Any]], float | None],
                 wanted: str) -> list[float]:
        ids = {str(number): number for number in range(len(rows))}
        found: dict[int, float] = {}
        for answer in self._asked([{"id": name, **row} for name, row in zip(ids, rows, strict=True)]):
            name = str(answer.get("id")) if isinstance(answer, Mapping) else None
            if name not in ids:
                raise self._fault(f"answered {str(answer)[:200]!r}, whose id was not asked", 'give back the "id"')
            value = read(answer)
            if value is None:
                raise self._fault(f"answered {str(answer)[:200]!r}", f"an answer is a JSON object with {wanted}")
            if ids[name] in found:
                raise self._fault(f"answered id {name} twice", "one answer for each id")
            found[ids[name]] = value
        if missing := [name for name, number in ids.items() if number not in found]:
            raise self._fault(f"left {len(missing)} of {len(rows)} questions without an answer, the first with id "
                              f"{missing[0]}", "one answer for each id")
        return [found[number] for number in range(len(rows))]

    def _asked(self, rows: list[dict[str, Any]]) -> Iterator[Any]:
        if rows:
            yield from self.ask(rows)

    def _fault(self, what: str, remedy: str) -> UserError:
        return UserError(f"{self.key}={self.name} {what}; {remedy}")


def open_judge(command: Sequence[str] | None, url: str | None, key: str, timeout_seconds: float = 600.0) -> Judge:
    """The judge that one of `command` and `url` names; nothing is started yet. `key`: that names it, for messages,
    as eval.judge.url. `timeout_seconds`: the longest wait for its next answer. UserError where the command is not
    there."""
    assert (command is None) != (url is None), "one of the two names the judge"
    if command is not None:
        program = Command(tuple(command), key, timeout_seconds)
        program.check()
        return Judge(program.ask, key, program.name)
    assert url is not None
    return Judge(Url(url, key, timeout_seconds).ask, key, url)


def _preference(answer: Mapping[str, Any]) -> float | None:
    if "winner" in answer:
        return WINS.get(str(answer["winner"]).lower())
    a, b = (_number(answer.get(name)) for name in ("score_a", "score_b"))
    return None if a is None or b is None else 1.0 if a > b else 0.0 if a < b else 0.5


def _score(answer: Mapping[str, Any]) -> float | None:
    return _number(answer.get("score"))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
