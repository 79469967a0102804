"""How long pairs are, and what a rank is given of them at once."""
from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a pair, how many pairs there are (None: not known), and where that is from."""

    prompt: float
    chosen: float
    rejected: float
    pairs: int | None
    source: str

    @property
    def pair(self) -> float:
        return self.prompt + self.chosen + self.rejected

    @property
    def seen_keys(self) -> float:
        """Keys laid out for attention: a prompt's stand before each of its completions again."""
        return 3 * self.prompt + self.chosen + self.rejected

    def mask(self, whole: bool) -> float:
        """Queries x keys of a pair's completions, and of its prompt where scores are written out (`whole`)."""
        branches = sum(c * (self.prompt + c) for c in (self.chosen, self.rejected))
        return branches + (self.prompt**2 if whole else 0)


def worst_lengths(max_length: int) -> Lengths:
    """Half of data.max_length for the prompt, half for each completion: the most tokens of a pair with equal parts."""
    half = max_length / 2
    return Lengths(half, half, half, None, f"worst case: every pair as long as data.max_length={max_length} allows, "
                                           "half of it prompt")


@dataclass(frozen=True)
class Packs:
    """What a rank forwards at once, and how often in a step."""

    tokens: float
    micro_steps: int
    completion_share: float          # of the tokens: those that the head sees

    @classmethod
    def of(cls, config: RunConfig, lengths: Lengths, ranks: int) -> Packs:
        a_rank = math.ceil(config.train.pairs_per_step / ranks) * lengths.pair
        # packs hold whole pairs only
        room = max(1, config.train.tokens_per_microbatch // lengths.pair) * lengths.pair
        steps = max(1, math.ceil(a_rank / room))
        return cls(a_rank / steps, steps, (lengths.chosen + lengths.rejected) / lengths.pair)

    @classmethod
    def largest(cls, config: RunConfig, lengths: Lengths, longest: int, ranks: int) -> Packs:
        """The most that a rank may be given at once, where the longest pair has so many tokens."""
        usual = cls.of(config, lengths, ranks)
        tokens = min(config.train.tokens_per_microbatch, math.ceil(config.train.pairs_per_step / ranks) * longest)
        return cls(max(tokens, longest), usual.micro_steps, usual.completion_share)
