"""One way to see a preference row whatever its layout, so that the same defect can be planted into any set.

`seen` takes a row as a file has it, `Pair.row` writes it again. Layouts: texts ({prompt, chosen, rejected}), messages,
hh (two transcripts), sharegpt, and three that hold more of the judgment: helpsteer (the order of the two answers),
argilla (each annotator's answer), ratings (a number an answer).
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
Turn = tuple[str, str]                       # (user | assistant | system, text)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPEAKERS = {"user": "Human", "assistant": "Assistant"}
FROM = {"user": "human", "assistant": "gpt", "system": "system"}
ANNOTATORS = ("ann", "ben", "cho", "dee", "eva", "finn", "gus")


@dataclass(frozen=True)
class Pair:
    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    layout: str = "texts"
    more: Row = field(default_factory=dict)  # what else the row holds
    chosen_first: bool = True                # helpsteer and argilla: which answer stands first
    votes: tuple[str, ...] = ("chosen",) * 3     # argilla: what each annotator said: chosen, rejected, tie or bad
    ratings: tuple[float, float] = (4.0, 2.0)    # ratings: of chosen and rejected

    @property
    def question(self) -> str:
        """The last turn of the prompt."""
        return self.prompt[-1][1]

    def asked(self, question: str) -> Pair:
        """The same with another last turn of the prompt."""
        return replace(self, prompt=(*self.prompt[:-1], (self.prompt[-1][0], question)))

    def row(self) -> Row:
        return {**WRITERS[self.layout](self), **self.more}


def seen(row: Row) -> Pair | None:
    """The row as a pair; None for one whose completions are more than one answer."""
    if "prompt" not in row and isinstance(row.get("chosen"), str):
        return _seen_transcripts(row)
    if "conversations" in row:
        more = {key: value for key, value in row.items() if key not in ("conversations", "chosen", "rejected")}
        return Pair(tuple((ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]),
                    row["chosen"]["value"], row["rejected"]["value"], "sharegpt", more)
    more = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
    if isinstance(row["prompt"], str):
        return Pair((("user", row["prompt"]),), row["chosen"], row["rejected"], "texts", more)
    if len(row["chosen"]) > 1 or len(row["rejected"]) > 1:
        return None
    return Pair(tuple((turn["role"], turn["content"]) for turn in row["prompt"]), row["chosen"][0]["content"],
                row["rejected"][0]["content"], "messages", more)


def laid_out(pairs: Sequence[Pair], layout: str) -> list[Pair]:
    """The same pairs in another layout."""
    return [replace(pair, layout=layout) for pair in pairs]


def _seen_transcripts(row: Row) -> Pair | None:
    chosen, rejected = (_turns(row[side]) for side in ("chosen", "rejected"))
    alike = chosen[:-1] == rejected[:-1] and chosen[-1][0] == rejected[-1][0] == "assistant"
    if not alike or len(chosen) < 2 or any(a[0] == b[0] for a, b in pairwise(chosen)):
        return None
    return Pair(tuple(chosen[:-1]), chosen[-1][1], rejected[-1][1], "hh")


def _turns(transcript: str) -> list[Turn]:
    pieces = re.split(r"(?:\A|\n\n)(Human|Assistant):", transcript)[1:]
    return [("user" if speaker == "Human" else "assistant", text.strip())
            for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)]


def _texts(pair: Pair) -> Row:
    return {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}


def _messages(pair: Pair) -> Row:
    return {"prompt": _chat(pair.prompt), "chosen": _chat([("assistant", pair.chosen)]),
            "rejected": _chat([("assistant", pair.rejected)])}


def _prompt(pair: Pair) -> str | list[dict[str, str]]:
    return pair.question if len(pair.prompt) == 1 else _chat(pair.prompt)


def _chat(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _hh(pair: Pair) -> Row:
    before = "".join(f"\n\n{SPEAKERS[role]}: {text}" for role, text in pair.prompt)
    return {"chosen": f"{before}\n\nAssistant: {pair.chosen}", "rejected": f"{before}\n\nAssistant: {pair.rejected}"}


def _sharegpt(pair: Pair) -> Row:
    return {"conversations": [{"from": FROM[role], "value": text} for role, text in pair.prompt],
            "chosen": {"from": "gpt", "value": pair.chosen}, "rejected": {"from": "gpt", "value": pair.rejected}}


def _helpsteer(pair: Pair) -> Row:
    answers = (pair.chosen, pair.rejected) if pair.chosen_first else (pair.rejected, pair.chosen)
    return {"context": _chat(pair.prompt), "response1": answers[0], "response2": answers[1],
            "overall_preference": -2 if pair.chosen_first else 2}


def _argilla(pair: Pair) -> Row:
    chosen, rejected = ("response_1", "response_2") if pair.chosen_first else ("response_2", "response_1")
    labels = {"chosen": chosen, "rejected": rejected, "tie": "tie", "bad": "both bad"}
    start = sum(map(ord, pair.question)) % len(ANNOTATORS)
    return {"prompt": _prompt(pair), chosen: pair.chosen, rejected: pair.rejected,
            "preference.responses": [labels[vote] for vote in pair.votes],
            "preference.responses.users": [ANNOTATORS[(start + i) % len(ANNOTATORS)] for i in range(len(pair.votes))],
            "preference.responses.status": ["submitted"] * len(pair.votes)}


def _ratings(pair: Pair) -> Row:
    return {"prompt": _prompt(pair), "responses": [pair.chosen, pair.rejected], "ratings": list(pair.ratings)}


WRITERS = {"texts": _texts, "messages": _messages, "hh": _hh, "sharegpt": _sharegpt, "helpsteer": _helpsteer,
           "argilla": _argilla, "ratings": _ratings}
