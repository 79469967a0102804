"""The nouns of the data, in the order in which they arise: PreferenceRow → TokenizedPair → PackedBatch → PairLogps."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:                            # what only reads rows does not wait for torch
    import torch
    from torch import Tensor

Message = dict[str, Any]                     # {"role": "user", "content": "..."}, as chat templates take it
TieKind = Literal["tie", "both_bad"]         # a judgment that neither answer is better, or that neither is good
TIE_KINDS: tuple[TieKind | None, ...] = (None, "tie", "both_bad")        # by the number that stands for it on disk


@dataclass(frozen=True)
class PreferenceRow:
    """One judgment as read from a file: messages (a prompt, a chosen and a rejected continuation) or texts."""

    prompt: tuple[Message, ...] | str        # str: one turn under a chat template, plain text without one
    chosen: tuple[Message, ...] | str
    rejected: tuple[Message, ...] | str
    where: str                               # "file:line", for messages to a person
    source: str = ""                         # the data set's name
    strength: float | None = None            # how much better chosen is (difference of ratings), in the data's own unit
    weight: float = 1.0                      # this pair's weight in the loss
    tools: tuple[dict[str, Any], ...] = ()   # tool schemas that the chat template shows to the model
    template_kwargs: dict[str, Any] = field(default_factory=dict)    # the row's own variables for the chat template
    # what else is known of the judgment, JSON-ready: tags, ratings, annotators, models
    record: dict[str, Any] = field(default_factory=dict)
    tie: TieKind | None = None               # neither is better: chosen and rejected are then two answers in any order


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt and its two completions as token ids. Completions end with the end-of-turn token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    where: str
    source: str = ""
    strength: float | None = None
    weight: float = 1.0
    # (C,) which tokens of a completion the loss counts; None: all of them
    chosen_counts: tuple[bool, ...] | None = None
    rejected_counts: tuple[bool, ...] | None = None
    record: dict[str, Any] = field(default_factory=dict)             # as in PreferenceRow
    left_out: tuple[str, ...] = ()           # what the chat template left out of the row, where that is allowed
    tie: TieKind | None = None               # as in PreferenceRow


class Span(NamedTuple):
    """Tokens start to end (exclusive) of a pack."""

    start: int
    end: int


@dataclass(frozen=True)
class Tree:
    """A prompt of the pack and its completions: each sees the prompt and itself, never the others."""

    prompt: Span
    branches: tuple[Span, ...]


@dataclass(frozen=True)
class PackedBatch:
    """One forward: trees laid end to end, without padding. T tokens, N counted completion tokens, S sequences, B pairs.

    Of a completion's tokens those are counted whose log-probs are asked for: all of them in scoring, those that the
    loss counts in training. The others are computed as context. A sequence is one (prompt, completion) with one choice
    of counted tokens; a pair names two of them. A pair may appear with weight 0: a filler that keeps the number of
    forwards equal on all ranks.
    """

    input_ids: Tensor                        # (1, T) int64
    position_ids: Tensor                     # (1, T) int64, restarts after the prompt in each branch
    trees: tuple[Tree, ...]                  # the S sequences are the branches, in this order
    predict_at: Tensor                       # (N,) int64: the position in the pack whose hidden state predicts ...
    targets: Tensor                          # (N,) int64: ... this token
    sequence: Tensor                         # (N,) int64 in [0, S): the sequence that the token belongs to
    offset: Tensor                           # (N,) int64: its place in the completion, from 0
    lengths: Tensor                          # (S,) int64: counted tokens of each sequence
    chosen: Tensor                           # (B,) int64 in [0, S)
    rejected: Tensor                         # (B,) int64 in [0, S)
    pair_ids: tuple[int, ...]                # (B,) the pairs' indexes in the data set
    weight: Tensor                           # (B,) float32
    strength: Tensor                         # (B,) float32, NaN where the data does not say
    # (N,) float32, nats: the reference's log-probs, where they are known when the pack is made
    reference: Tensor | None = None
    tie: Tensor | None = None                # (B,) uint8: 0 chosen is better, else the place in TIE_KINDS; None: all 0

    @property
    def n_tokens(self) -> int:
        return self.input_ids.shape[1]

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Where in the pack the prompt and the completion of each of the S sequences stand, in order."""
        return ((slice(*tree.prompt), slice(*branch)) for tree in self.trees for branch in tree.branches)

    def sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(prompt ids, completion ids) of the S sequences, in order: int64 views of input_ids, which are on the CPU."""
        ids = self.input_ids[0].numpy()
        return ((ids[prompt], ids[completion]) for prompt, completion in self.slices())

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """(N,) values of the counted tokens, cut by sequence: S views, in the order of `sequences`."""
        return values.split(self.lengths.tolist())

    def counted(self, values: Tensor) -> Tensor:
        """(N,) of values of all completion tokens, laid end to end in the order of `sequences`: those of the counted
        ones."""
        if len(values) == len(self.targets):
            return values
        ends = np.cumsum([completion.stop - completion.start for _, completion in self.slices()])
        assert len(values) == ends[-1], "a value for each completion token"
        starts = self.offset.new_tensor([0, *ends[:-1].tolist()])
        return values[starts[self.sequence] + self.offset]

    def pinned(self) -> PackedBatch:
        """The same in page-locked memory, from which a copy to a GPU does not hold up the process."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors()})

    def to(self, device: torch.device) -> PackedBatch:
        """The same on the device. From page-locked memory it is copied while the process goes on."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors()})

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        from torch import Tensor

        return ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))


@dataclass(frozen=True)
class TokenLogps:
    """What the model says of a pack's N counted tokens."""

    logps: Tensor                            # (N,) float32, nats: log p(target | what it sees)
    # (N,) float32, nats: log of the sum over the vocabulary of p², no gradient (for WPO)
    log_collision: Tensor | None = None


@dataclass(frozen=True)
class PairLogps:
    """What a loss sees: B pairs' summed log-probs in nats, and what the step as a whole is.

    reference_* are None for losses without a reference. A mean over the step is sum(weight · loss) / sum(weight); a
    loss that is a token mean over the step (sft) divides by `mean_chosen_tokens`, so that the same sum gives it
    exactly.
    """

    policy_chosen: Tensor                    # (B,) nats, sum over the completion's counted tokens
    policy_rejected: Tensor                  # (B,)
    reference_chosen: Tensor | None          # (B,)
    reference_rejected: Tensor | None        # (B,)
    chosen_tokens: Tensor                    # (B,) float32, counted tokens
    rejected_tokens: Tensor                  # (B,)
    strength: Tensor                         # (B,) float32, NaN where unknown
    mean_chosen_tokens: Tensor | float       # scalar: weighted mean of chosen_tokens over the whole step
    wpo_weight: Tensor | None = None         # (B,) in (0, 1], no gradient: how likely the pair is under the policy
    whole_chosen: Tensor | None = None       # (B,) only with ld_alpha: policy_chosen with every token counted in full,
    whole_rejected: Tensor | None = None     # (B,)   for a mixture's terms that do not use ld_alpha (sft)
    # (B,) nats, no gradient; where there is a reference: how far the policy went from it, ...
    kl_per_token: Tensor | None = None
    # (B,) ... and how much likelier the chosen completion became; see logps.drift
    chosen_drift_per_token: Tensor | None = None
    tie: Tensor | None = None                # (B,) uint8, as in PackedBatch: above 0 where neither is better
