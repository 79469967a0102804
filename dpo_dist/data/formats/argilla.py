"""Argilla: answers to a prompt, and which of them annotators found better, in the several shapes it writes."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from dpo_dist.data.fields import Fields, Unfit, first_of, number_or_none
from dpo_dist.data.formats.format import DataRow, NoPair, Outcome, Tie
from dpo_dist.data.formats.free import beside_answer, joined, of_answer
from dpo_dist.data.formats.judgment import judgment_of, known
from dpo_dist.data.formats.pairs import pair
from dpo_dist.data.formats.ties import tie_label
from dpo_dist.data.records import json_ready

PROMPTS = ("prompt", "instruction", "question", "input", "context", "conversation", "messages", "query", "chat")
ANSWERS = ("response", "completion", "generation", "answer", "output", "reply", "candidate", "text", "model")
# "response_1", "generation-2", "Response A", "modelB", "3": what it is called, and which one it is
MARKED = re.compile(r"(.*?)(?:[\s_.-]*(\d+)|[\s_.-]+([a-dA-D])|(?<=[a-z])([A-D]))$")
# what free columns are not: prompts, answers and what belongs to them, questions with what was said and suggested
READS = (f"{'|'.join(PROMPTS)}|chosen|rejected|fields|responses|suggestions|vectors|_server_id|"
         rf"(.*[\s_.-])?({'|'.join(ANSWERS)})[\s_.-]*(\d+|[a-dA-D])([\s_.-].*)?|"
         r".*\.(responses|suggestion)(\..*)?|.*-suggestion(-metadata)?")
FIRST_AND_SECOND = {"first": 0, "left": 0, "a": 0, "second": 1, "right": 1, "b": 1}


@dataclass(frozen=True)
class Said:
    """One annotator's answer to a question."""

    user: str | None
    value: Any
    status: str | None

    @property
    def counts(self) -> bool:
        return self.value is not None and self.status in (None, "submitted")


def argilla(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """An Argilla record: a prompt, answers such as response_1 and response_2, and what annotators said of them.

    Their answers stand as "preference.responses" with ".users" and ".status" beside it (flattened, Argilla 2), as a
    list of {"user_id", "value", "status"} (Argilla 1), or within `responses` and `fields` (a record as it is). A value
    is the name of the better answer, or a ranking of them. Submitted answers decide, the majority of them; a draw is a
    tie, or both bad where more than half say so. strength is the share of the annotators by which chosen won.
    """
    if isinstance(fields.get("fields"), dict):
        fields = {**fields, **fields["fields"]}
    questions = {name: said for name, said in _questions(fields) if said}
    answers = _answers(fields, questions)
    prompt = fields[first_of(fields, *PROMPTS)]
    if not any(said.counts for people in questions.values() for said in people):
        yield NoPair("no submitted answer")
        return
    question, ranked = _preference(questions, answers)
    people = questions[question]
    counted = [ranks for said, ranks in zip(people, ranked, strict=True) if ranks is not None and said.counts]
    judgment = judgment_of(fields)
    for a, b in combinations(answers, 2):
        votes = [_vote(ranks, a, b) for ranks in counted]
        chosen, rejected = (a, b) if sum(votes) >= 0 else (b, a)
        record = joined(judgment["record"], known({"annotators": [
            known({"annotator": said.user, "preference": _side(said, ranks, chosen, rejected), "status": said.status})
            for said, ranks in zip(people, ranked, strict=True)],
            "suggestion": _suggestion(fields, question, answers, chosen, rejected)}),
            of_answer("chosen", beside_answer(fields, chosen)), of_answer("rejected", beside_answer(fields, rejected)))
        row = partial(_row, prompt, (chosen, rejected), fields, where, source,
                      {**judgment, "strength": abs(sum(votes)) / len(votes), "record": record})
        bad = [tie_label(said.value) == "both_bad" for said in people if said.counts]
        yield row() if sum(votes) else Tie("both_bad" if 2 * sum(bad) > len(bad) else "tie", row)


def _row(prompt: Any, keys: tuple[str, str], fields: Fields, where: str, source: str,
         judgment: dict[str, Any]) -> DataRow:
    return pair(prompt, fields[keys[0]], fields[keys[1]], fields, where, source, **judgment)


def is_argilla(fields: Fields) -> bool:
    return any(True for _, said in _questions(fields) if said)


def _questions(fields: Fields) -> Iterator[tuple[str, list[Said]]]:
    for key, value in fields.items():
        if key.endswith(".responses") and isinstance(value, list):
            yield key.removesuffix(".responses"), [
                Said(*entry) for entry in zip(_beside(fields, f"{key}.users", value), value,
                                              _beside(fields, f"{key}.status", value), strict=True)]
        elif key == "responses" and isinstance(value, dict) and "fields" in fields:
            yield from ((name, _said(held)) for name, held in value.items())
        elif isinstance(value, list | dict) and (said := _said(value)):
            yield key, said


def _beside(fields: Fields, key: str, values: list[Any]) -> list[Any]:
    found = fields.get(key)
    return found if isinstance(found, list) and len(found) == len(values) else [None] * len(values)


def _said(value: Any) -> list[Said]:
    """What annotators said, from a list of {"user_id", "value", "status"}, or from one object of three lists."""
    if isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("user_id", "value")):
        value = [dict(zip(value, entry, strict=False)) for entry in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(v, dict) and {"user_id", "value"} <= v.keys() for v in value):
        return []
    return [Said(None if v["user_id"] is None else str(v["user_id"]), v["value"], v.get("status")) for v in value]


def _answers(fields: Fields, questions: dict[str, list[Said]]) -> list[str]:
    """The fields that hold the answers: response_1, response_2, ..., or chosen and rejected."""
    named: dict[str, list[str]] = {}
    for key, value in fields.items():
        mark = MARKED.match(key)
        if mark and key not in questions and isinstance(value, str | list):
            named.setdefault(_plain(mark[1]), []).append(key)
    groups = {stem: keys for stem, keys in named.items() if len(keys) > 1 and any(word in stem for word in ANSWERS)}
    if groups:                               # of several (model_1 beside response_1), the one that says so plainest
        return groups[min(groups, key=lambda stem: next(
            (at, stem != word) for at, word in enumerate(ANSWERS) if word in stem))]
    if {"chosen", "rejected"} <= fields.keys():
        return ["chosen", "rejected"]
    raise Unfit("no answers that are numbered, such as response_1 and response_2", f"fields: {', '.join(fields)}")


def _preference(questions: dict[str, list[Said]], answers: list[str]) -> tuple[str, list[dict[str, float] | None]]:
    """The question that asks which answer is better, and each annotator's ranks (lower is better). Raises Unfit."""
    for name, people in questions.items():
        ranked = [_ranks(said.value, answers) for said in people]
        counted = [ranks for said, ranks in zip(people, ranked, strict=True) if said.counts]
        if counted and None not in counted:
            return name, ranked
    shown = {said.value if isinstance(said.value, str) else repr(said.value)[:40]
             for people in questions.values() for said in people if said.counts}
    raise Unfit("no question whose values are names of the answers",
                f"answers {', '.join(answers)}; values {', '.join(sorted(shown)[:5])}")


def _ranks(value: Any, answers: list[str]) -> dict[str, float] | None:
    """{answer: rank} as a label or a ranking says it; None where it says no such thing."""
    if isinstance(value, str):
        if tie_label(value, loosely=True):
            return dict.fromkeys(answers, 1.0)
        best = _named(value, answers)
        return None if best is None else {answer: 1.0 if answer == best else 2.0 for answer in answers}
    if isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("value", "rank")):
        value = [{"value": v, "rank": r} for v, r in zip(value["value"], value["rank"], strict=False)]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(entry, str) for entry in value):               # names alone, the best first
        order = [_named(entry, answers) for entry in value]
        return None if None in order else {answer: float(order.index(answer) if answer in order else len(order))
                                           for answer in answers}
    ranks = {}
    for entry in value:
        name = _named(entry.get("value"), answers) if isinstance(entry, dict) else None
        rank = number_or_none(entry.get("rank")) if isinstance(entry, dict) else None
        if name is None or rank is None:
            return None
        ranks[name] = rank
    return ranks


def _named(label: Any, answers: list[str]) -> str | None:
    """The answer that a label names: response_1 by "response-1", "Response 1", "1"; also "A", "first", "left"."""
    if not isinstance(label, str):
        return None
    plain = _plain(label)
    for same in (plain.__eq__, plain.startswith):        # "Response 1 is better" too
        found = [answer for answer in answers if same(_plain(answer))]
        if len(found) == 1:
            return found[0]
    mark = _mark(label)
    marked = [answer for answer in answers if mark and _mark(answer) == mark]
    if marked:
        return marked[0]
    at = FIRST_AND_SECOND.get(plain, FIRST_AND_SECOND.get(mark or ""))
    return answers[at] if at is not None and len(answers) == 2 else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _mark(name: str) -> str | None:
    found = MARKED.match(name) or re.fullmatch(r"()(\d+)|([a-dA-D])", name.strip())
    return next((group.lower() for group in found.groups()[1:] if group), None) if found else None


def _vote(ranks: dict[str, float], a: str, b: str) -> int:
    """1 where a is better, -1 where b is, 0 where neither."""
    if a not in ranks or b not in ranks:
        return 0
    return (ranks[a] < ranks[b]) - (ranks[a] > ranks[b])


def _side(said: Said | None, ranks: dict[str, float] | None, chosen: str, rejected: str) -> str | None:
    if ranks is None:
        return None
    tie = "both_bad" if said and tie_label(said.value) == "both_bad" else "tie"
    return (tie, "chosen", "rejected")[_vote(ranks, chosen, rejected)]


def _suggestion(fields: Fields, question: str, answers: list[str], chosen: str, rejected: str) -> Any:
    key = f"{question}.suggestion"
    held = {"value": fields.get(key), "agent": fields.get(f"{key}.agent"), "score": fields.get(f"{key}.score")}
    if f"{question}-suggestion" in fields:   # Argilla 1
        about = fields.get(f"{question}-suggestion-metadata")
        held = {**(about if isinstance(about, dict) else {}), "value": fields[f"{question}-suggestion"]}
    elif isinstance(fields.get("suggestions"), dict) and isinstance(fields["suggestions"].get(question), dict):
        held = fields["suggestions"][question]
    side = _side(None, _ranks(held.get("value"), answers), chosen, rejected)
    return known({"preference": side, "agent": held.get("agent"), "score": json_ready(held.get("score"))}) or None
