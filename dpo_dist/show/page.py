"""What a person sees of a data set: its pairs as they are trained on, and what became of the other rows."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data.templates import PLAIN
from dpo_dist.show.rows import Look, Outcome, Trained
from dpo_dist.show.text import Piece, decode, ids_line, pieces_of, shortened, visible
from dpo_dist.types import TokenizedPair

LABEL = 12                               # columns before a text
STYLES = {"chosen": "green", "rejected": "red"}
COUNTED = {"assistant": "of a completion's turns, only the assistant's own tokens", "completion": "all of a completion"}

REMEDIES = {"data.on_bad_row=error": "mend them, or set data.on_bad_row=skip to leave them out and count them",
            "data.truncation=error": "raise data.max_length, or set data.truncation to drop, keep_start or keep_end"}


class Page:
    """Writes to a console: with colours, or with ‹marks› around what counts where it has none."""

    def __init__(self, console: Console, tokenizer: Any | None, config: DataConfig):
        self.console, self.tokenizer, self.config = console, tokenizer, config
        self.coloured = console.is_terminal

    def head(self, path: str, has_template: bool) -> None:
        """What holds for all data sets."""
        mark = "in colour" if self.coloured else "‹so›"
        self._line("tokenizer", f"of model.path={path}" if self.tokenizer is not None else
                   f"none in model.path={path}: token ids alone")
        self._line("template", self._template(has_template))
        self._line("counted", f"{COUNTED[self.config.train_on]} (data.train_on={self.config.train_on}), shown {mark}")

    def _template(self, has_template: bool) -> str:
        given = self.config.chat_template
        if not has_template:
            return "none: texts are taken as they are" + (" (data.chat_template=none)" if given == PLAIN else "")
        names = getattr(self.tokenizer, "chat_template", None)
        if given is None:
            named = f", of those it has ({', '.join(names)})" if isinstance(names, dict) else ""
            return f"the tokenizer's own chat template{named}"
        if isinstance(names, dict) and given in names:
            return f"the tokenizer's own chat template '{given}' (data.chat_template)"
        return "Jinja text of data.chat_template" if "{{" in given or "{%" in given else f"data.chat_template={given}"

    def data_set(self, key: str, dataset: DatasetConfig, look: Look) -> None:
        """A data set's first rows, the longest of those looked at and one at random, and a summary."""
        told = ", told from its rows" if dataset.format == "auto" and look.report.format != "auto" else ""
        name = dataset.name or dataset.path
        self.console.print()
        self.console.print(Text(f"{key}: {name}, format {look.report.format}{told}", style="bold"), soft_wrap=True)
        shown = [*look.first, *(look.longest or ())[1:]]
        if whole := next((outcome.whole for outcome in shown if isinstance(outcome, Trained)), None):
            self._ends(whole)
        for number, outcome in enumerate(look.first, start=1):
            self._outcome(str(number), outcome)
        among = f"all {look.seen:,}" if look.whole else f"the first {look.seen:,}"
        shown_before = look.longest is not None and look.longest[0] <= len(look.first)
        if look.longest is not None and not shown_before:
            self._outcome(f"{look.longest[0]:,}, the longest of {among}", look.longest[1])
        if look.random is not None and look.random != look.longest:
            self._outcome(f"{look.random[0]:,}, one at random of {among}", look.random[1])
        if look.seen:
            self._summary(look, among)

    def _ends(self, pair: TokenizedPair) -> None:
        """How prompts begin and completions end, as one pair shows."""
        if self.tokenizer is None:
            return
        first, last = (decode(self.tokenizer, ids) for ids in (pair.prompt_ids[:1], pair.chosen_ids[-1:]))
        bos = self.tokenizer.bos_token_id
        absent = "no BOS" if bos is None else f"no BOS, which would be {self.tokenizer.bos_token!r}"
        self.console.print(Text(f"  prompts begin with {first!r} ({'BOS' if pair.prompt_ids[0] == bos else absent}); "
                                f"completions end with {last!r}"), soft_wrap=True)

    def _outcome(self, label: str, outcome: Outcome) -> None:
        self.console.print()
        if not isinstance(outcome, Trained):
            what = "bad row" if outcome.bad else "dropped"
            detail = f" ({outcome.detail})" if outcome.detail else ""
            self.console.print(Text.assemble((label, "bold"), f"  {outcome.where}  ",
                                             (f"{what}: {outcome.reason}{detail}", "yellow")), soft_wrap=True)
            return
        pair = outcome.pair
        facts = [f"strength {pair.strength:g}"] if pair.strength is not None else []
        facts = [pair.tie.replace("_", " ")] if pair.tie else facts
        facts += [f"weight {pair.weight:g}"] * (pair.weight != 1) + ["held out"] * outcome.held_out
        self.console.print(Text.assemble((label, "bold"), f"  {outcome.where}", *(f"  {fact}" for fact in facts)),
                           soft_wrap=True)
        if any(outcome.lost_tokens):
            lost = ", ".join(f"{n} of {name}" for n, name in zip(outcome.lost_tokens, ("the prompt", "chosen",
                                                                                      "rejected"), strict=True) if n)
            self.console.print(Text(f"  cut to data.max_length={self.config.max_length} "
                                    f"(data.truncation={self.config.truncation}): tokens gone: {lost}", "yellow"),
                               soft_wrap=True)
        for left_out in pair.left_out:
            self.console.print(Text(f"  WARNING: {left_out} (data.on_missing_content=warn)", "yellow"), soft_wrap=True)
        self._part("prompt", pair.prompt_ids, (), [False] * len(pair.prompt_ids))
        for name, ids, counts in (("chosen", pair.chosen_ids, pair.chosen_counts),
                                  ("rejected", pair.rejected_ids, pair.rejected_counts)):
            self._part(name, ids, pair.prompt_ids, [True] * len(ids) if counts is None else counts)

    def _part(self, name: str, ids: Sequence[int], before: Sequence[int], counts: Sequence[bool]) -> None:
        """The text of a prompt or a completion, its length and its ids."""
        pieces = visible(shortened(pieces_of(self.tokenizer, ids, before, counts)))
        self._line(name, self._text(pieces, STYLES.get(name, "")))
        n_counted = sum(counts)
        counted = "" if name == "prompt" else ", all counted" if n_counted == len(ids) else f", {n_counted:,} counted"
        shown = "" if self.tokenizer is None else f": {ids_line(ids)}"
        self._line("", Text(f"{len(ids):,} token{'s' * (len(ids) != 1)}{counted}{shown}", style="dim"))

    def _text(self, pieces: Sequence[Piece], style: str) -> Text:
        text, open_mark = Text(), False
        for piece in pieces:
            if piece.counted != open_mark and not self.coloured:
                text.append("‹" if piece.counted else "›")
            open_mark = piece.counted
            text.append(piece.text, "yellow" if piece.note else f"{'bold' if piece.special else ''} {style}"
                        if piece.counted else "dim cyan" if piece.special else "dim")
        if open_mark and not self.coloured:
            text.append("›")
        if text.plain.endswith("\n"):
            text.right_crop()
        return text

    def _line(self, label: str, text: Text | str) -> None:
        """A label, and beside it a text that may have several lines."""
        text = Text(text) if isinstance(text, str) else text
        lines = (text.wrap(self.console, max(20, self.console.width - LABEL)) if self.coloured
                 else text.split("\n", allow_blank=True))
        for at, line in enumerate(lines or [Text()]):
            start = Text(f"  {label}".ljust(LABEL) if at == 0 else " " * LABEL)
            self.console.print(start + line, soft_wrap=True)

    def _summary(self, look: Look, among: str) -> None:
        bad, dropped = look.report.bad, look.dropped
        n_bad, n_dropped = sum(bad.counts.values()), sum(dropped.counts.values())
        left_out = look.report.ties - look.report.kept_ties
        ties = f", {left_out:,} ties left out" if left_out else ""
        self.console.print()
        self.console.print(Text(f"  of {among}: {look.pairs:,} pairs, {n_bad:,} bad, {n_dropped:,} dropped{ties}",
                                style="bold"), soft_wrap=True)
        for reason, count in look.report.no_pair.items():
            self.console.print(Text(f"    without a pair: {count:,} × {reason}"), soft_wrap=True)
        for verb, tally in (("bad", bad), ("dropped", dropped)):
            for reason, count in sorted(tally.counts.items(), key=lambda item: -item[1]):
                self.console.print(Text(f"    {verb}: {count:,} × {reason}, e.g. {tally.examples[reason][0]}"),
                                   soft_wrap=True)
        for setting in sorted(look.stopped_by):
            self.console.print(Text(f"  a run stops at such rows ({setting}): {REMEDIES[setting]}", style="yellow"),
                               soft_wrap=True)
