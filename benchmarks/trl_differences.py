"""How two tokenizations of a row differ, by kind; and how each stands to generation.

At generation the prompt is fed as the chat template renders it with its generation prompt, and the model goes on
until the first token that stops generation. So the right prompt is known, and the right completion too where the
conversation, tokenized whole, begins with that prompt.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]                         # prompt, chosen, rejected: lists of messages
Ids = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]       # of prompt, chosen, rejected

FIXED_DATE = datetime(2024, 7, 26)           # what dpo-dist gives to templates that ask for the date
LONGEST_SHOWN = 12                           # tokens by which the beginnings of two completions may differ


@dataclass
class Kind:
    """A kind of difference: how often, and the first one."""

    count: int
    example: str


@dataclass
class Comparison:
    """Of one set under one template. {"trl": …, "ours": …} are counts of prompts, or of completions (two a pair);
    known: of completions whose tokens at generation are known."""

    pairs: int = 0                           # rows that both sides took
    equal_prompts: int = 0
    equal_completions: int = 0
    prompts_as_at_inference: dict[str, int] = field(default_factory=lambda: {"trl": 0, "ours": 0})
    ends_where_generation_stops: dict[str, int] = field(default_factory=lambda: {"trl": 0, "ours": 0})
    as_generated: dict[str, int] = field(default_factory=lambda: {"trl": 0, "ours": 0, "known": 0})
    kinds: dict[str, Kind] = field(default_factory=dict)

    def note(self, kind: str, example: str) -> None:
        self.kinds.setdefault(kind, Kind(0, example)).count += 1


class Judge:
    """For one tokenizer, and the tokens at which its model stops."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: tuple[str, ...]):
        self.tokenizer = tokenizer
        self.stops = set(tokenizer.convert_tokens_to_ids(list(stops)))
        self.dated = "strftime_now" in tokenizer.chat_template

    def compare(self, result: Comparison, n: int, row: Row, trls: Ids, ours: Ids) -> None:
        """Counts what is equal, right and different in a row that both sides took."""
        result.pairs += 1
        fed = self._fed(row)
        fed_then = self._fed(row, FIXED_DATE) if self.dated else fed
        result.prompts_as_at_inference["trl"] += trls[0] == fed
        result.prompts_as_at_inference["ours"] += ours[0] == fed_then
        if trls[0] == ours[0]:
            result.equal_prompts += 1
        elif self.dated and trls[0] == fed and ours[0] == fed_then:
            result.note("prompt: the date is today's in TRL, a fixed one in ours", f"row {n}")
        else:
            rest = self._tokens(fed[len(trls[0]):]) if trls[0] == fed[:len(trls[0])] else ""
            result.note(f"prompt: TRL cuts {rest} off its end" if rest else "prompt: other",
                        f"row {n}: TRL {self._around(trls)} — ours {self._around(ours)}")
        for side, name in ((1, "chosen"), (2, "rejected")):
            generated = self._generated(row, name, fed)
            result.as_generated["known"] += generated is not None
            for who, ids in (("trl", trls[side]), ("ours", ours[side])):
                result.ends_where_generation_stops[who] += self._first_stop(ids) == len(ids) - 1
                result.as_generated[who] += generated is not None and ids == generated
            if trls[side] == ours[side]:
                result.equal_completions += 1
            else:
                for kind in self._kinds(trls, ours, side):
                    result.note(f"completion: {kind}",
                                f"row {n}: TRL {self._around(trls, side)} — ours {self._around(ours, side)}")

    def only_trl(self, result: Comparison, n: int, row: Row, trls: Ids, refusal: str) -> None:
        """Notes a row that ours refuses, and what becomes of it in TRL."""
        fed = self._fed(row)
        kind = refusal if refusal.startswith("bad row") else refusal.partition(":")[0]
        if trls[0] != fed and trls[0] == fed[:len(trls[0])]:
            kind += f", TRL cuts {self._tokens(fed[len(trls[0]):])} off the prompt"
        if trls[1] == trls[2]:
            kind += ", both completions are the same in TRL"
        result.note(f"row: ours refuses: {kind}", f"row {n}: TRL {self._around(trls)}")

    def _fed(self, row: Row, date: datetime | None = None) -> tuple[int, ...]:
        """What an inference server feeds for this prompt (on the day `date`)."""
        text = self.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        if date:
            for form in ("%Y-%m-%d", "%d %b %Y", "%B %d, %Y"):
                text = text.replace(datetime.now().strftime(form), date.strftime(form))
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generated(self, row: Row, side: str, fed: tuple[int, ...]) -> tuple[int, ...] | None:
        """The completion's tokens in the whole conversation, up to the one that stops generation; this may be the next
        turn's first. None where the conversation does not begin with what inference feeds."""
        turns = row["prompt"] + row[side]
        for whole in (turns, turns + row["prompt"][-1:]):
            text = self.tokenizer.apply_chat_template(whole, tokenize=False)
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            rest = ids[len(fed):]
            if ids[:len(fed)] == fed and (stop := self._first_stop(rest)) is not None:
                return rest[:stop + 1]
        return None

    def _first_stop(self, ids: tuple[int, ...]) -> int | None:
        return next((at for at, token in enumerate(ids) if token in self.stops), None)

    def _kinds(self, trls: Ids, ours: Ids, side: int) -> Iterator[str]:
        """How two completions differ: at their ends, and at their beginnings."""
        a, b = trls[side], ours[side]
        more_a, more_b = _tails(a, b)
        if more_a:
            yield f"TRL goes on after the end of turn with {self._tokens(a[len(a) - more_a:])}"
        if more_b:
            yield f"ours ends it with {self._tokens(b[len(b) - more_b:])}, TRL not at all"
        a, b = a[:len(a) - more_a], b[:len(b) - more_b]
        if a == b:
            return
        same = _shared_end(a, b)
        cut_off = self._text(ours[0][len(trls[0]):]) if trls[0] == ours[0][:len(trls[0])] else ""
        if max(len(a), len(b)) - same > LONGEST_SHOWN:
            yield "other"
        elif cut_off and self._text(a) == cut_off + self._text(b):
            yield f"TRL's begins with {cut_off!r}, which inference feeds"
        elif self._text(a) == self._text(b):
            yield "the same text, but its first word is other tokens"
        else:
            yield f"begins with {self._tokens(a[:len(a) - same])} in TRL, {self._tokens(b[:len(b) - same])} in ours"

    def _text(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _tokens(self, ids: tuple[int, ...]) -> str:
        return " ".join(repr(self._text((token,))) for token in ids)

    def _around(self, ids: Ids, side: int = 1) -> str:
        """The tokens around the boundary ║, and the last ones; a · for what is neither added nor white space."""
        prompt, completion = ([self._sign(token) for token in part] for part in (ids[0][-4:], ids[side]))
        shown = completion if len(completion) <= 9 else [*completion[:4], "…", *completion[-4:]]
        return " ".join(["…", *prompt, "║", *shown])

    def _sign(self, token: int) -> str:
        if token in self.tokenizer.added_tokens_decoder or not self._text((token,)).strip():
            return str(self.tokenizer.convert_ids_to_tokens(token))
        return "·"


def _tails(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
    """How many tokens the one has after the other's end: the fewest that make the last tokens agree."""
    return min(((i, j) for j in range(3) for i in range(3)
                if i < len(a) and j < len(b) and a[len(a) - 1 - i] == b[len(b) - 1 - j]), key=sum, default=(0, 0))


def _shared_end(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    backwards = zip(a[::-1], b[::-1], strict=False)
    return next((i for i, (x, y) in enumerate(backwards) if x != y), min(len(a), len(b)))
