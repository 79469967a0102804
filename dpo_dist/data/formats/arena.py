"""Arenas of models: two conversations, and which model a person found better; a tie and both bad are answers too."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from dpo_dist.data.fields import Fields, Turns, Unfit, first_of, from_json, need, reserved, yes_or_no
from dpo_dist.data.formats.format import DataRow, Outcome, Tie
from dpo_dist.data.formats.free import joined, of_answer
from dpo_dist.data.formats.judgment import judgment_of
from dpo_dist.data.formats.pairs import diverge
from dpo_dist.data.formats.ties import tie_label
from dpo_dist.data.messages import turns_of
from dpo_dist.types import TieKind

SIDES = ("a", "b")
WINNERS = {"modela": "a", "a": "a", "modelb": "b", "b": "b"}


def arena(fields: Fields, where: str, source: str) -> Iterator[Outcome]:
    """LMSYS's {"model_a", "model_b", "winner": "model_a" | "model_b" | "tie" | "tie (bothbad)" | "both_bad",
    "conversation_a", "conversation_b", "judge", "language"}; or `prompt`, `response_a` and `response_b` (texts, or
    lists of a turn each) with `winner_model_a`, `winner_model_b` and `winner_tie`, 1 for one of them."""
    winner, tie = _winner(fields)
    chats = {side: _chat(fields, side) for side in SIDES}
    judgment = judgment_of(fields)

    def row(chosen: str, rejected: str) -> DataRow:
        about = (of_answer(name, {"model": fields[f"model_{side}"]} if f"model_{side}" in fields else {})
                 for name, side in (("chosen", chosen), ("rejected", rejected)))
        return diverge(chats[chosen], chats[rejected], where, source, fields,
                       **{**judgment, "record": joined(judgment["record"], *about)})

    yield Tie(tie, partial(row, "a", "b")) if tie else row(winner, "b" if winner == "a" else "a")


def _winner(fields: Fields) -> tuple[str, TieKind | None]:
    if "winner" in fields:
        said = fields["winner"]
        tie = tie_label(said)
        winner = WINNERS.get(said.replace("_", "").strip().lower()) if isinstance(said, str) else None
        if tie is None and winner is None:
            raise Unfit("winner is neither model_a, model_b, tie nor both_bad", reserved("winner", repr(said)[:40]))
        return winner or "a", tie
    found = [side for side in SIDES if yes_or_no(fields.get(f"winner_model_{side}"))]
    if yes_or_no(fields.get("winner_tie")) and not found:
        return "a", "tie"
    if len(found) != 1:
        raise Unfit("not one of winner_model_a, winner_model_b and winner_tie is 1")
    return found[0], None


def _chat(fields: Fields, side: str) -> Turns:
    key = first_of(fields, f"conversation_{side}", f"response_{side}")
    if key.startswith("conversation"):
        return turns_of(fields[key], key, "assistant")
    need(fields, "prompt")
    asked, said = (_turns(fields[name], name) for name in ("prompt", key))
    if len(asked) != len(said):
        raise Unfit(f"prompt and {key} differ in their number of turns", f"{len(asked)} and {len(said)}")
    return tuple({"role": role, "content": text or ""} for exchange in zip(asked, said, strict=True)
                 for role, text in zip(("user", "assistant"), exchange, strict=True))


def _turns(value: Any, key: str) -> list[str | None]:
    """The texts of a list, also of one that stands as JSON text, or the one text; null for a turn that failed."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = from_json(value, key, list)
        except Unfit:
            pass                             # a text that only begins with a bracket
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise Unfit(f"{key} is neither text nor a list of texts")
    return texts
