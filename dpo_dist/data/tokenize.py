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
from dpo_dist.data.chat import PLAIN, ChatTemplate, TemplateMisfit, chat_template
from dpo_dist.data.formats import DataRow
from dpo_dist.data.rows import Tally
from dpo_dist.types import PreferenceRow, TokenizedPair

ANCHOR = "\n"                                # see PairTokenizer.encode_completions


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

    def add(self, before: TokenizedPair | Dropped, after: TokenizedPair | Dropped) -> None:
        if isinstance(after, Dropped):
            self.dropped.add(after.reason, f"{after.where}: {after.detail or after.reason}")
        else:
            self.kept += 1
            self.truncated += after is not before

    def join(self, later: TruncationReport) -> None:
        """Adds what became of later rows."""
        self.kept, self.truncated = self.kept + later.kept, self.truncated + later.truncated
        self.dropped.join(later.dropped)


# ----------------------------------------------------------------------------------------------------------- tokenizing


@dataclass(frozen=True)
class PairTokenizer:
    tokenizer: Any | None
    template: ChatTemplate | None
    skip_misfits: bool                       # data.on_bad_row=skip
    anchored: bool = False                   # the tokenizer puts a space before any text
    bos: tuple[int, ...] = ()                # what begins plain text; a chat template writes its own

    @staticmethod
    def of(tokenizer: Any | None, config: DataConfig) -> PairTokenizer:
        skip = config.on_bad_row == "skip"
        if tokenizer is None:
            return PairTokenizer(None, None, skip)
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token, so the end of an answer cannot be marked; set eos_token "
                            "in its tokenizer_config.json")
        template = chat_template(tokenizer, config.chat_template)
        first = "".join(tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"]))
        begun = tokenizer("a")["input_ids"][:1]
        return PairTokenizer(tokenizer, template, skip, anchored=first[:1] in ("▁", "Ġ"),
                             bos=tuple(begun) if template is None and begun == [tokenizer.bos_token_id] else ())

    def encode(self, rows: Sequence[DataRow]) -> list[TokenizedPair | Dropped]:
        """A pair for each row, not truncated; rows of token ids pass through. Raises UserError."""
        found = [row if isinstance(row, TokenizedPair) else self._split(row) for row in rows]
        texts = [texts for texts in found if isinstance(texts, tuple)]
        prompts = [tuple(ids) if tuple(ids[:1]) == self.bos else (*self.bos, *ids)
                   for ids in self._ids([prompt for prompt, _, _ in texts])]
        completions = self.encode_completions([text for _, chosen, rejected in texts for text in (chosen, rejected)])
        ids = zip(prompts, completions[::2], completions[1::2], strict=True)
        return [TokenizedPair(*next(ids), row.where, row.source, row.strength, row.weight, record=row.record)
                if isinstance(entry, tuple) else entry for row, entry in zip(rows, found, strict=True)]

    def _split(self, row: PreferenceRow) -> tuple[str, str, str] | Dropped:
        if self.tokenizer is None:
            raise UserError(f"{row.where}: text needs a tokenizer, and there is none; give a model with one, or "
                            "token_ids rows")
        if self.template is not None:
            try:
                return self.template.split(row)
            except TemplateMisfit as misfit:
                if self.skip_misfits:
                    return Dropped(row.where, "does not fit the chat template", str(misfit))
                raise UserError(f"{row.where}: {misfit}; mend the row or data.chat_template, or set "
                                "data.on_bad_row=skip to leave such rows out and count them") from misfit
        if isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str):
            return row.prompt, row.chosen, row.rejected
        raise UserError(f"{row.where}: messages need a chat template; the tokenizer has none, or "
                        f"data.chat_template={PLAIN} switched it off; set data.chat_template to a Jinja file, or give "
                        "rows of format preference")

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts or self.tokenizer is None:
            return []
        distinct = list(dict.fromkeys(texts))          # the pairs of a rated prompt share most of theirs
        ids = self.tokenizer(distinct, add_special_tokens=False, return_attention_mask=False,
                             verbose=False)["input_ids"]
        known = dict(zip(distinct, ids, strict=True))
        return [known[text] for text in texts]

    def encode_completions(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Token ids of texts that continue a prompt, closed by an end-of-turn token.

        A tokenizer that puts a space before any text (SentencePiece's dummy prefix) would put one into the middle of
        the conversation: there, the text is tokenized after a line break, whose tokens are then taken off.
        """
        encoded = self._ids([ANCHOR + text for text in texts] if self.anchored else texts)
        if self.anchored:
            anchor = self._ids([ANCHOR])[0]
            encoded = [ids[len(anchor):] if ids[:len(anchor)] == anchor else self._ids([text])[0]
                       for ids, text in zip(encoded, texts, strict=True)]
        return [tuple(ids) if self._is_closed(text, ids) else (*ids, self._eos)
                for text, ids in zip(texts, encoded, strict=True)]

    def _is_closed(self, text: str, ids: list[int]) -> bool:
        if self.template is not None and self.template.end_of_turn and text.endswith(self.template.special):
            return True                      # its end of turn, or another that it uses instead (as after a tool call)
        return ids[-1:] == [self._eos]

    @property
    def _eos(self) -> int:
        assert self.tokenizer is not None
        return int(self.tokenizer.eos_token_id)


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
                          rejected_ids=pair.rejected_ids[:room])
        else:                                # both completions keep the very same prompt
            cut = replace(pair, prompt_ids=prompt[length - limit:])
    if not cut.prompt_ids:
        return Dropped(pair.where, "no prompt token left" if prompt else "the prompt has no tokens", f"{length} tokens")
    if not cut.chosen_ids or not cut.rejected_ids:
        return Dropped(pair.where, "no completion token left", f"{len(prompt)} prompt tokens")
    if cut.chosen_ids == cut.rejected_ids:
        return Dropped(pair.where, "identical once truncated" if cut is not pair else "identical once tokenized")
    return cut
