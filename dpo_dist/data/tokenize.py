"""PreferenceRow → TokenizedPair, and truncation.

Prompt and completion are tokenized apart, so the boundary between them is exact and the same as at generation time. A
completion ends with its end-of-turn token: the chat template's, or the tokenizer's eos where there is no template or it
has none.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.chat import Answer, RowTexts, TemplateMisfit
from dpo_dist.data.fields import Unfit, sound_text
from dpo_dist.data.formats import DataRow
from dpo_dist.data.frame import from_last
from dpo_dist.data.rows import Tally
from dpo_dist.data.shown import Said, Shown
from dpo_dist.data.templates import PLAIN, ChatTemplates, chat_templates
from dpo_dist.types import PreferenceRow, TokenizedPair

Ids = tuple[int, ...]
Counts = tuple[bool, ...] | None             # which tokens of a completion count; None: all of them


@dataclass(frozen=True)
class Dropped:
    where: str
    reason: str
    detail: str = ""


@dataclass
class TruncationReport:
    """What became of the rows on their way to tokens of at most data.max_length."""

    kept: int = 0                            # the truncated ones included
    truncated: int = 0
    dropped: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)                   # kept rows of which the template shows not all

    def add(self, before: TokenizedPair | Dropped, after: TokenizedPair | Dropped) -> None:
        if isinstance(after, Dropped):
            self.dropped.add(after.reason, f"{after.where}: {after.detail or after.reason}")
        else:
            self.kept += 1
            self.truncated += after is not before
            for kind in after.left_out:
                self.left_out.add(kind, after.where)

    def join(self, later: TruncationReport) -> None:
        """Adds what became of later rows."""
        self.kept, self.truncated = self.kept + later.kept, self.truncated + later.truncated
        self.dropped.join(later.dropped)
        self.left_out.join(later.left_out)


# ----------------------------------------------------------------------------------------------------------- tokenizing


@dataclass(frozen=True)
class PairTokenizer:
    tokenizer: Any | None
    templates: ChatTemplates | None
    config: DataConfig
    anchored: bool = False                   # the tokenizer puts a space before any text
    bos: tuple[int, ...] = ()                # what begins plain text; a chat template writes its own
    shown: dict[str, Shown] = field(default_factory=dict)            # by the template's text

    @staticmethod
    def of(tokenizer: Any | None, config: DataConfig) -> PairTokenizer:
        if tokenizer is None:
            return PairTokenizer(None, None, config)
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token, so the end of an answer cannot be marked; set eos_token "
                            "in its tokenizer_config.json")
        templates = chat_templates(tokenizer, config.chat_template, config.chat_template_kwargs)
        first = "".join(tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"]))
        begun = tokenizer("a")["input_ids"][:1]
        return PairTokenizer(tokenizer, templates, config, anchored=first[:1] in ("▁", "Ġ"),
                             bos=tuple(begun) if templates is None and begun == [tokenizer.bos_token_id] else ())

    def encode(self, rows: Sequence[DataRow]) -> list[TokenizedPair | Dropped]:
        """A pair for each row, not truncated; rows of token ids pass through. Raises UserError."""
        found = [row if isinstance(row, TokenizedPair) else self._split(row) for row in rows]
        texts = [entry.texts for entry in found if isinstance(entry, _Split)]
        prompts = iter([tuple(ids) if tuple(ids[:1]) == self.bos else (*self.bos, *ids)
                        for ids in self._ids([row.prompt for row in texts])])
        answers = iter(self._encode_answers([answer for row in texts for answer in (row.chosen, row.rejected)]))
        pairs: list[TokenizedPair | Dropped] = []
        for row, entry in zip(rows, found, strict=True):
            if not isinstance(entry, _Split):
                pairs.append(entry)
                continue
            assert isinstance(row, PreferenceRow)
            (chosen, chosen_counts), (rejected, rejected_counts) = next(answers), next(answers)
            pairs.append(TokenizedPair(next(prompts), chosen, rejected, row.where, row.source, row.strength, row.weight,
                                       chosen_counts, rejected_counts, row.record, entry.left_out, row.tie))
        return pairs

    def _split(self, row: PreferenceRow) -> _Split | Dropped:
        """The row's texts and what a template left out of them; Dropped or UserError for a row that it does not fit."""
        if self.tokenizer is None:
            raise UserError(f"{row.where}: text needs a tokenizer, and there is none; give a model with one, or "
                            "token_ids rows")
        if self.templates is not None:
            try:
                return self._rendered(row, self.templates)
            except TemplateMisfit as misfit:
                if self.config.on_bad_row == "skip":
                    return Dropped(row.where, misfit.reason, misfit.detail)
                raise UserError(f"{row.where}: {misfit}; {misfit.remedy}, or set data.on_bad_row=skip to leave such "
                                "rows out and count them") from misfit
        if row.template_kwargs:
            raise UserError(f"{row.where}: the row has chat_template_kwargs, but there is no chat template; set "
                            "data.chat_template, or map that column away (columns: {chat_template_kwargs: null})")
        if isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str):
            # a rendered prompt ends with a special token, after which text is tokenized otherwise
            after = from_last(row.prompt, self.tokenizer.all_special_tokens) or Answer.after
            return _Split(RowTexts(row.prompt, Answer(row.chosen, after=after), Answer(row.rejected, after=after)))
        raise UserError(f"{row.where}: messages need a chat template; the tokenizer has none, or "
                        f"data.chat_template={PLAIN} switched it off; set data.chat_template to a Jinja file, or give "
                        "rows of format preference")

    def _rendered(self, row: PreferenceRow, templates: ChatTemplates) -> _Split:
        template = templates.of(row)
        texts = template.split(row, own=self.config.train_on == "assistant")
        for name, text in (("prompt", texts.prompt), ("chosen", texts.chosen.text), ("rejected", texts.rejected.text)):
            try:
                sound_text(text, name)       # contents are sound, but half a character may come from a call or a tool
            except Unfit as unfit:
                raise TemplateMisfit(f"{unfit.reason} once rendered", f"{unfit.reason} once rendered", "mend the row",
                                     unfit.detail) from None
        missing = self.shown.setdefault(template.text, Shown(template)).missing(row, texts)
        if missing and self.config.on_missing_content == "error":
            raise _left_out(missing[0], template.name)
        return _Split(texts, tuple(dict.fromkeys(said.kind for said in missing)))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts or self.tokenizer is None:
            return []
        distinct = list(dict.fromkeys(texts))          # the pairs of a rated prompt share most of theirs
        ids = self.tokenizer(distinct, add_special_tokens=False, return_attention_mask=False,
                             verbose=False)["input_ids"]
        known = dict(zip(distinct, ids, strict=True))
        return [known[text] for text in texts]

    def _encode_answers(self, answers: list[Answer]) -> list[tuple[Ids, Counts]]:
        """Token ids of answers, each closed by an end-of-turn token, and which of them the assistant says."""
        encoded = self._ids_within(answers)
        out: list[tuple[Ids, Counts]] = []
        for answer, ids in zip(answers, encoded, strict=True):
            closed = answer.closed or ids[-1:] == [self._eos]
            counts = None
            if answer.own is not None:
                said = self._said(answer, ids)
                counts = None if all(said) else (*said, *([] if closed else [True]))
            out.append((tuple(ids) if closed else (*ids, self._eos), counts))
        return out

    def _ids_within(self, answers: list[Answer]) -> list[list[int]]:
        """Token ids of answers as they stand in the conversation.

        A tokenizer that puts a space before any text (SentencePiece's dummy prefix) would put one into the middle of
        the conversation: there, an answer is tokenized after what precedes it, whose tokens are then taken off.
        """
        if not self.anchored:
            return self._ids([answer.text for answer in answers])
        anchors = {answer.after: self._ids([answer.after])[0] for answer in answers}
        encoded = self._ids([answer.after + answer.text for answer in answers])
        return [ids[len(anchor):] if ids[:len(anchor := anchors[answer.after])] == anchor else
                self._ids([answer.text])[0] for answer, ids in zip(answers, encoded, strict=True)]

    def _said(self, answer: Answer, ids: list[int]) -> list[bool]:
        """Which of an answer's tokens begin in what the assistant says."""
        assert self.tokenizer is not None and answer.own is not None
        if not self.tokenizer.is_fast:
            raise UserError("completions of several turns need a tokenizer that tells where its tokens stand (a "
                            "tokenizer.json); set data.train_on=completion to count all their tokens")
        for anchor in (answer.after, "") if self.anchored else ("",):
            found = self.tokenizer(anchor + answer.text, add_special_tokens=False, return_offsets_mapping=True)
            skipped = len(found["input_ids"]) - len(ids)
            if found["input_ids"][skipped:] == ids:
                starts = [start - len(anchor) for start, _ in found["offset_mapping"][skipped:]]
                return [any(begin <= start < end for begin, end in answer.own) for start in starts]
        raise AssertionError("the same text gave other tokens")

    @property
    def _eos(self) -> int:
        assert self.tokenizer is not None
        return int(self.tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Split:
    """A row's texts, and what its template left out of them (data.on_missing_content=warn)."""

    texts: RowTexts
    left_out: tuple[str, ...] = ()


def _left_out(said: Said, template: str) -> TemplateMisfit:
    where = f"{said.part} turn {said.turn + 1}: " if said.turn >= 0 else ""
    return TemplateMisfit(
        f"{where}the chat template ({template}) leaves out {said.what}: {said.text[:60]!r}", said.kind,
        "mend the row or data.chat_template, set data.on_missing_content=warn to train on what is shown",
        f"{where}{said.text[:60]!r}; template: {template}")


# ----------------------------------------------------------------------------------------------------------- truncation


def truncate(pair: TokenizedPair | Dropped, config: DataConfig) -> TokenizedPair | Dropped:
    """The pair itself where prompt + longer completion fits data.max_length; else what data.truncation makes of it."""
    if isinstance(pair, Dropped):
        return pair
    limit, prompt = config.max_length, pair.prompt_ids
    length = len(prompt) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    cut = pair
    if length > limit:
        if config.truncation == "error":
            raise UserError(f"{pair.where}: {length} tokens are more than data.max_length={limit}; raise it, or set "
                            "data.truncation to drop, keep_start or keep_end")
        if config.truncation == "drop":
            return Dropped(pair.where, "longer than data.max_length", f"{length} tokens")
        if config.truncation == "keep_start":
            room = max(0, limit - len(prompt))
            cut = replace(pair, prompt_ids=prompt[:limit], chosen_ids=pair.chosen_ids[:room],
                          rejected_ids=pair.rejected_ids[:room],
                          chosen_counts=pair.chosen_counts and pair.chosen_counts[:room],
                          rejected_counts=pair.rejected_counts and pair.rejected_counts[:room])
        else:                                # both completions keep the very same prompt
            cut = replace(pair, prompt_ids=prompt[length - limit:])
    if not cut.prompt_ids:
        return Dropped(pair.where, "no prompt token left" if prompt else "the prompt has no tokens", f"{length} tokens")
    if not cut.chosen_ids or not cut.rejected_ids:
        return Dropped(pair.where, "no completion token left", f"{len(prompt)} prompt tokens")
    if cut.chosen_ids == cut.rejected_ids:
        return Dropped(pair.where, "identical once truncated" if cut is not pair else "identical once tokenized")
    for name, counts in (("chosen", cut.chosen_counts), ("rejected", cut.rejected_counts)):
        if counts is not None and not any(counts):
            return Dropped(pair.where, "no token that counts is left in a completion" if cut is not pair else
                           "no token of a completion counts", name)
    return cut
