"""Answers to the same held-out prompts at every evaluation (eval.samples), so that a person can read what training
does."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.store import PairStore
from dpo_dist.data.templates import chat_templates, eos_ids
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.policy import Policy
from dpo_dist.policy.generate import Ids, Sampling, generate
from dpo_dist.run.generations import samples_by_step
from dpo_dist.run.inputs import Inputs
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World

SHOWN, CHARACTERS = 3, 160                   # samples of the table that a run ends with, and of each text in it


@dataclass(frozen=True)
class Samples:
    """The prompts that are answered, and how."""

    prompts: tuple[Ids, ...]
    how: Sampling
    tokenizer: Any | None                    # None: rows of token ids, which stay ids
    pairs: tuple[int, ...] = ()              # the first held-out pair of each prompt

    @staticmethod
    def of(config: RunConfig, inputs: Inputs) -> Samples:
        """The `eval.samples` held-out prompts with the smallest hashes of their tokens: the same whatever the order of
        the rows, and more of them keep those that fewer gave. Fewer where there are no more."""
        pairs = inputs.eval
        tokenizer = load_tokenizer(inputs.policy.tokenizer) if config.eval.samples else None
        stop = stop_ids(inputs.policy.base, tokenizer, config)
        how = Sampling(stop, config.eval.max_new_tokens, config.eval.temperature, config.train.tokens_per_microbatch,
                       config.train.seed)
        first = tuple(_first_of_each(pairs)[:config.eval.samples])
        return Samples(tuple(pairs[i].prompt_ids for i in first), how, tokenizer, first)

    def answer(self, policy: Policy, step: int, world: World) -> list[dict[str, Any]]:
        """A row of samples.jsonl for each prompt. All ranks call it."""
        return self.rows(step, self.complete(policy, step, world))

    def complete(self, policy: Policy, step: int, world: World) -> list[Ids]:
        """The policy's completion of each prompt, with the token that ends it. All ranks call it."""
        return generate(policy, self.prompts, replace(self.how, seed=self.how.seed + step), world)

    def rows(self, step: int, completions: Sequence[Ids]) -> list[dict[str, Any]]:
        """A row of samples.jsonl for each prompt, of its completion."""
        return [{"step": step, "prompt": self._text(prompt), "tokens": len(ids), "ended": ids[-1:] in self._ends,
                 "completion": self._text(self._without_end(ids))}
                for prompt, ids in zip(self.prompts, completions, strict=True)]

    def chosen(self, held_out: PairStore) -> list[tuple[str | list[int], int]]:
        """(text, tokens) of the data's own chosen answer to each prompt."""
        answers = [held_out[i].chosen_ids for i in self.pairs]
        return [(self._text(self._without_end(ids)), len(ids)) for ids in answers]

    def _without_end(self, ids: Ids) -> Ids:
        return ids[:-1] if ids[-1:] in self._ends else ids

    @property
    def _ends(self) -> set[Ids]:
        return {(token,) for token in self.how.stop}

    def _text(self, ids: Ids) -> str | list[int]:
        return list(ids) if self.tokenizer is None else str(self.tokenizer.decode(ids))


def _first_of_each(pairs: PairStore) -> list[int]:
    """The first pair of each prompt, in the order of the prompts' hashes."""
    return [int(i) for i in np.unique(pairs.content[:, 0], return_index=True)[1]]


def stop_ids(folder: Path, tokenizer: Any | None, config: RunConfig) -> Ids:
    """The tokens at which completions end: those at which the model's own generation stops, and what ends a completion
    of the data: the chat template's end of turn, or the tokenizer's eos."""
    found = eos_ids(folder / "generation_config.json") | eos_ids(folder / "config.json")
    if tokenizer is not None:
        found.add(tokenizer.eos_token_id)
        templates = chat_templates(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
        if templates is not None:
            found |= set(tokenizer.convert_tokens_to_ids(list(templates.default.end_of_turn[-1:])))
    return tuple(sorted(found - {None}))


def show_samples(terminal: Terminal, run_dir: RunDir, columns: Mapping[str, int]) -> None:
    """A table of a few answers, with a column for each of these steps, and where all of them are."""
    rows = samples_by_step(run_dir.samples)
    at = [rows.get(step, [])[:SHOWN] for step in columns.values()]
    cells = [[_end(answers[0]["prompt"]), *(_start(answer["completion"]) for answer in answers)]
             for answers in zip(*at, strict=False)]
    terminal.table("answers to held-out prompts", ["prompt", *columns], cells)
    terminal.say(f"samples: {run_dir.samples}")


def _start(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= CHARACTERS else f"{line[:CHARACTERS]} …"


def _end(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= CHARACTERS else f"… {line[-CHARACTERS:]}"
