"""HelpSteer: two answers to a prompt, and by how much people preferred the second to the first."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_dist.data.fields import Fields, first_of, number, number_or_none
from dpo_dist.data.formats.format import DataRow, Outcome, Tie
from dpo_dist.data.formats.free import beside_answer, joined, of_answer
from dpo_dist.data.formats.judgment import judgment_of, known
from dpo_dist.data.formats.pairs import pair


def helpsteer(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """HelpSteer3's {"context", "response1", "response2", "overall_preference": -3 (the first) to 3 (the second),
    "individual_preference"}; also HelpSteer2's {"prompt", "response_1", "response_2", "preference_strength"}."""
    prompt = fields[first_of(fields, "context", "prompt")]
    keys = [first_of(fields, f"response{n}", f"response_{n}") for n in (1, 2)]
    key = first_of(fields, "overall_preference", "preference_strength")
    preference = number(fields[key], key)
    chosen = 1 if preference > 0 else 0
    judgment = judgment_of(fields)
    people = fields.get("individual_preference")
    annotators = [_helpsteer_annotator(p, chosen) for p in (people if isinstance(people, list) else [])
                  if isinstance(p, dict)]
    tags: Any = {name: fields[name] for name in ("domain", "language") if isinstance(fields.get(name), str)}
    own = judgment["record"].get("tags")     # the row's own stand beside them, or, where they are no names, in place
    tags = {**tags, **own} if isinstance(own, dict) else tags if own is None else own
    record = joined(judgment["record"], known({"annotators": annotators or None, "tags": tags or None}),
                    of_answer("chosen", beside_answer(fields, keys[chosen])),
                    of_answer("rejected", beside_answer(fields, keys[1 - chosen])))

    def row() -> DataRow:
        return pair(prompt, fields[keys[chosen]], fields[keys[1 - chosen]], fields, where, source,
                    **{**judgment, "strength": abs(preference), "record": record})

    yield row() if preference else Tie("tie", row)


def _helpsteer_annotator(said: dict[str, Any], chosen: int) -> dict[str, Any]:
    score = number_or_none(said.get("score"))
    side = None if score is None else "tie" if score == 0 else "chosen" if (score > 0) == bool(chosen) else "rejected"
    return known({"preference": side, "strength": None if score is None else abs(score),
                  "reason": said.get("reasoning"), "chosen_feedback": said.get(f"feedback{chosen + 1}"),
                  "rejected_feedback": said.get(f"feedback{2 - chosen}")})
