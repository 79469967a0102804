"""Defects of preference data, planted by a seed into any set, with the places where they stand.

`plant` and `plant_all` take the rows of a file (row_layouts.py says which layouts) and give the rows with the defects
in them, and for each kind which rows are at fault. A row gets one defect at most. Kinds that say something of a
judgment need a layout that holds it: there all rows of the file are written in that layout.
"""
from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from planted_texts import FOREIGN, SPECIAL_TOKENS, gibberish, listed, plain_style, reworded
from row_layouts import Pair, Row, laid_out, seen

LONG_ENOUGH = 25                             # words of a prompt that one changed word leaves nearly the same


@dataclass(frozen=True)
class Planted:
    """Where a defect stands: indexes (from 0) of the rows that were made faulty, and of the rows that they are at odds
    with (the original of a copy)."""

    rows: tuple[int, ...]
    beside: tuple[int, ...] = ()

    def lines(self) -> set[int]:
        """Lines of a JSON Lines file, from 1, at which an audit may point."""
        return {index + 1 for index in (*self.rows, *self.beside)}


@dataclass
class Entry:
    row: Row | None                          # as it stood; None once it is changed
    pair: Pair | None                        # None: a row that nothing is planted in
    fault: str = ""
    beside: str = ""

    def written(self) -> Row:
        if self.row is not None:
            return self.row
        assert self.pair is not None
        return self.pair.row()


@dataclass(frozen=True)
class Options:
    held_out: Sequence[Row] = ()             # leakage: whose prompts come to stand in the rows
    special: tuple[str, ...] = SPECIAL_TOKENS
    words: int = 3000                        # truncation_loss: how long an answer becomes
    layout: str | None = None                # in which all rows are written; None: as they came, where that will do


@dataclass
class Planting:
    """The set while defects come into it."""

    entries: list[Entry]
    r: random.Random
    options: Options

    def free(self, count: int, fits: Callable[[Pair], bool] = lambda pair: True) -> list[Entry]:
        """So many entries, drawn from those without a defect. ValueError where there are too few."""
        fitting = [e for e in self.entries if e.pair is not None and not e.fault and not e.beside and fits(e.pair)]
        if len(fitting) < count:
            raise ValueError(f"{count} defects do not fit into {len(fitting)} rows")
        return self.r.sample(fitting, count)

    def put(self, entry: Entry, kind: str, pair: Pair) -> None:
        entry.row, entry.pair, entry.fault = None, pair, kind

    def add(self, kind: str, pair: Pair) -> None:
        """A new row, somewhere."""
        self.entries.insert(self.r.randint(0, len(self.entries)), Entry(None, pair, kind))

    def lay_out(self, *layouts: str) -> None:
        """Writes the whole set in the first of these layouts, unless it is in one of them."""
        if any(entry.pair is not None and entry.pair.layout not in layouts for entry in self.entries):
            self.entries = [entry for entry in self.entries if entry.pair is not None]
            for entry in self.entries:
                assert entry.pair is not None
                entry.row = None
                entry.pair = replace(laid_out([entry.pair], layouts[0])[0], chosen_first=self.r.random() < 0.5)

    def answer(self, pair: Pair) -> str:
        """An answer that belongs to another row without a defect, and differs from both of this one."""
        while True:
            entry = self.r.choice(self.entries)
            said = "" if entry.pair is None or entry.fault else entry.pair.chosen
            if said.strip() and said not in (pair.chosen, pair.rejected):
                return said

    def fresh(self, pair: Pair) -> Pair:
        """The same prompt with two other answers."""
        chosen = self.answer(pair)
        return replace(pair, chosen=chosen, rejected=self.answer(replace(pair, rejected=chosen)))


def plant(rows: Sequence[Row], kind: str, count: int, r: random.Random,
          options: Options = Options()) -> tuple[list[Row], Planted]:
    """The rows with so many defects of one kind, and where they stand."""
    planted, places = plant_all(rows, {kind: count}, r, options)
    return planted, places[kind]


def plant_all(rows: Sequence[Row], counts: Mapping[str, int], r: random.Random,
              options: Options = Options()) -> tuple[list[Row], dict[str, Planted]]:
    """The rows with defects of several kinds, each in rows of its own, and where they stand."""
    planting = Planting([Entry(row, seen(row)) for row in rows], r, options)
    if options.layout:
        planting.lay_out(options.layout)
    for kind, count in counts.items():
        KINDS[kind](planting, count)
    places = {kind: Planted(tuple(i for i, e in enumerate(planting.entries) if e.fault == kind),
                            tuple(i for i, e in enumerate(planting.entries) if e.beside == kind)) for kind in counts}
    return [entry.written() for entry in planting.entries], places


# ------------------------------------------------------------------------------------------------- rows against others


def duplicate_pair(set_: Planting, count: int) -> None:
    for entry in set_.free(count):
        set_.add("duplicate_pair", entry.pair)
        entry.beside = "duplicate_pair"


def near_duplicate_prompt(set_: Planting, count: int) -> None:
    for entry in set_.free(count, _has_long_prompt):
        set_.add("near_duplicate_prompt", set_.fresh(entry.pair.asked(reworded(entry.pair.question, set_.r))))
        entry.beside = "near_duplicate_prompt"


def contradiction(set_: Planting, count: int) -> None:
    for entry in set_.free(count):
        set_.add("contradiction", replace(entry.pair, chosen=entry.pair.rejected, rejected=entry.pair.chosen))
        entry.beside = "contradiction"


def preference_cycle(set_: Planting, count: int) -> None:
    """a > b > c > a; every third is of four answers."""
    for number, entry in enumerate(set_.free(count)):
        pair, answers = entry.pair, [entry.pair.chosen, entry.pair.rejected]
        while len(answers) < (4 if number % 3 == 2 else 3):
            more = set_.answer(pair)
            if more not in answers:
                answers.append(more)
        for better, worse in zip(answers[1:], [*answers[2:], answers[0]], strict=True):
            set_.add("preference_cycle", replace(pair, chosen=better, rejected=worse))
        entry.beside = "preference_cycle"


def leakage(set_: Planting, count: int) -> None:
    """Prompts of the held-out rows, every second one reworded, with other answers."""
    held_out = [pair for row in set_.options.held_out if (pair := seen(row)) and _has_long_prompt(pair)]
    layout = next(entry.pair.layout for entry in set_.entries if entry.pair)
    for number, pair in enumerate(set_.r.sample(held_out, count)):
        asked = pair.asked(reworded(pair.question, set_.r)) if number % 2 else pair
        set_.add("leakage", replace(set_.fresh(asked), layout=layout))


def _has_long_prompt(pair: Pair) -> bool:
    return sum(len(text.split()) for _, text in pair.prompt) >= LONG_ENOUGH and len(pair.question.split()) >= 4


# ------------------------------------------------------------------------------------------------ what the judges said


def tie(set_: Planting, count: int) -> None:
    set_.lay_out("argilla", "ratings")
    for entry in set_.free(count):
        set_.put(entry, "tie", replace(entry.pair, votes=("tie",) * 3, ratings=(3.0, 3.0)))


def both_bad(set_: Planting, count: int) -> None:
    set_.lay_out("argilla")
    for entry in set_.free(count):
        set_.put(entry, "both_bad", replace(entry.pair, votes=("bad",) * 3))


def annotator_disagreement(set_: Planting, count: int) -> None:
    set_.lay_out("argilla")
    for number, entry in enumerate(set_.free(count)):
        votes = ("chosen", "rejected", "chosen") if number % 2 else ("chosen",) * 3 + ("rejected",) * 2
        set_.put(entry, "annotator_disagreement", replace(entry.pair, votes=votes))


def position_bias(set_: Planting, count: int) -> None:
    set_.lay_out("helpsteer", "argilla")
    for entry in set_.free(count, lambda pair: not pair.chosen_first):
        set_.put(entry, "position_bias", replace(entry.pair, chosen_first=True))


# ------------------------------------------------------------------------------------------------- how answers are told


def identical_completions(set_: Planting, count: int) -> None:
    for entry in set_.free(count):
        set_.put(entry, "identical_completions", replace(entry.pair, rejected=entry.pair.chosen))


def length_bias(set_: Planting, count: int) -> None:
    """The longer answer becomes the chosen one."""
    for entry in set_.free(count, lambda pair: len(pair.chosen) < len(pair.rejected)):
        pair = replace(entry.pair, chosen=entry.pair.rejected, rejected=entry.pair.chosen)
        set_.put(entry, "length_bias", pair)


def style_bias(set_: Planting, count: int) -> None:
    """Chosen becomes a list with bold words, rejected plain text; the words stay."""
    for entry in set_.free(count, lambda pair: len(pair.chosen.split()) > 12):
        pair = replace(entry.pair, chosen=listed(entry.pair.chosen), rejected=plain_style(entry.pair.rejected))
        set_.put(entry, "style_bias", pair)


def language_mix(set_: Planting, count: int) -> None:
    """Answers in another language than the prompt: both, or one of them."""
    for number, entry in enumerate(set_.free(count)):
        said = FOREIGN[number % len(FOREIGN)]
        answers = [" ".join(set_.r.sample(said, set_.r.randint(3, 5))) for _ in range(2)]
        sides = ("chosen", "rejected") if number % 3 == 0 else ("chosen",) if number % 3 == 1 else ("rejected",)
        while answers[0] == answers[1]:
            answers[1] = " ".join(set_.r.sample(said, 4))
        changes = dict(zip(sides, answers, strict=False))
        set_.put(entry, "language_mix", replace(entry.pair, **changes))


def special_tokens_in_text(set_: Planting, count: int) -> None:
    """A special token amid the words of an answer or of the prompt."""
    for number, entry in enumerate(set_.free(count, lambda pair: all(
            len(text.split()) > 3 for text in (pair.question, pair.chosen, pair.rejected)))):
        token = set_.options.special[number % len(set_.options.special)]

        def amid(text: str, token: str = token) -> str:
            at = set_.r.choice([space.start() for space in re.finditer(" ", text)] or [len(text)])
            return f"{text[:at]} {token}{text[at:]}"

        pair = entry.pair
        pair = (replace(pair, chosen=amid(pair.chosen)), replace(pair, rejected=amid(pair.rejected)),
                pair.asked(amid(pair.question)))[number % 3]
        set_.put(entry, "special_tokens_in_text", pair)


def truncation_loss(set_: Planting, count: int) -> None:
    for number, entry in enumerate(set_.free(count)):
        side = ("chosen", "rejected")[number % 2]
        text = getattr(entry.pair, side)
        while len(text.split()) < set_.options.words:
            text += " " + set_.answer(entry.pair)
        set_.put(entry, "truncation_loss", replace(entry.pair, **{side: text}))


def empty_reasoning(set_: Planting, count: int) -> None:
    for number, entry in enumerate(set_.free(count)):
        block = ("<think>\n\n</think>\n\n", "<think></think>\n", "<think> </think>")[number % 3]
        sides = ("chosen", "rejected") if number % 2 else ("chosen",)
        set_.put(entry, "empty_reasoning", replace(
            entry.pair, **{side: block + getattr(entry.pair, side) for side in sides}))


def too_easy(set_: Planting, count: int) -> None:
    """Rejected is not language at all, and as long as it was."""
    for entry in set_.free(count):
        set_.put(entry, "too_easy", replace(entry.pair, rejected=gibberish(entry.pair.rejected, set_.r)))


def hopeless(set_: Planting, count: int) -> None:
    """Chosen is not language at all."""
    for entry in set_.free(count):
        set_.put(entry, "hopeless", replace(entry.pair, chosen=gibberish(entry.pair.chosen, set_.r)))


KINDS: dict[str, Callable[[Planting, int], None]] = {kind.__name__: kind for kind in (
    duplicate_pair, near_duplicate_prompt, contradiction, preference_cycle, leakage, tie, both_bad,
    annotator_disagreement, position_bias, identical_completions, length_bias, style_bias, language_mix,
    special_tokens_in_text, truncation_loss, empty_reasoning, too_easy, hopeless)}


def token_faults(rows: Sequence[Row], count: int, r: random.Random, bos: int, eos: int) -> tuple[list[Row], Planted]:
    """Rows of token ids, each of which begins with `bos` and whose completions end with `eos`, with faults of a
    template in so many of them: BOS twice, EOS twice, no EOS at all."""
    rows, places = [dict(row) for row in rows], tuple(sorted(r.sample(range(len(rows)), count)))
    for number, index in enumerate(places):
        row = rows[index]
        if number % 3 == 0:
            row["prompt_ids"] = [bos, *row["prompt_ids"]]
        else:
            side = r.choice(("chosen_ids", "rejected_ids"))
            row[side] = [*row[side], eos] if number % 3 == 1 else row[side][:-1]
    return rows, Planted(places)
