"""EvaluatedPairs: what a held-out evaluation measured of each pair, and its file, evaluations/step-NNNNNN.parquet."""
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_dist.runtime.tables import read_columns, write_columns

Floats = NDArray[np.float64]
INTEGERS = ("pair", "chosen_tokens", "rejected_tokens")


@dataclass(frozen=True)
class EvaluatedPairs:
    """(n,) each, in the order of the store. NaN: the loss has none (no reference, no rewards, no rejected answers)."""

    pair: NDArray[np.int32]                  # index in the held-out store
    weight: Floats                           # in the loss
    policy_chosen: Floats                    # nats, summed over the completion's counted tokens
    policy_rejected: Floats
    reference_chosen: Floats
    reference_rejected: Floats
    reward_chosen: Floats                    # as losses.rewards
    reward_rejected: Floats
    logit: Floats                            # log odds that chosen is preferred, as losses.preference_logit
    loss: Floats
    chosen_tokens: NDArray[np.int32]         # that the loss counts
    rejected_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def margin(self) -> Floats:
        """(n,) reward of chosen less that of rejected; NaN where there are no rewards."""
        return self.reward_chosen - self.reward_rejected

    @property
    def has_rewards(self) -> bool:
        return not np.isnan(self.reward_chosen).all()

    @property
    def has_reference(self) -> bool:
        return not np.isnan(self.reference_chosen).all()

    def write(self, path: Path) -> None:
        """Writes the file, in place of an earlier one."""
        write_columns(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def read(path: Path) -> EvaluatedPairs | None:
        """What `write` wrote; None where it is not there, or damaged, which the log tells."""
        kinds = {field.name: np.int32 if field.name in INTEGERS else np.float64 for field in fields(EvaluatedPairs)}
        found = read_columns(path, kinds)
        return None if found is None else EvaluatedPairs(**found)


def hits(margin: Floats) -> Floats:
    """(n,) 1 where chosen is ahead, 0.5 at a tie, else 0, as the metric rewards/accuracies counts."""
    return (margin > 0) + 0.5 * (margin == 0)
