"""Local sums → global means: what a step or an evaluation measured, summed on each rank, reduced once a logged row."""
from __future__ import annotations

import torch
from torch import Tensor

from dpo_dist.config.schema import LossConfig
from dpo_dist.losses import rewards
from dpo_dist.runtime.world import World
from dpo_dist.types import PairLogps

MEANS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
         "logps/rejected", "reference/kl_per_token", "reference/chosen_drift_per_token")
# means over all pairs; the others speak of chosen and rejected, and are means over the pairs that are no ties
OF_ALL = ("loss", "reference/kl_per_token")


class MetricSums:
    """Sums over pairs, weighted as in the loss; kept on the device, so that adding never waits for it.

    Of a tie (PairLogps.tie) no answer is the better one, so it counts in OF_ALL's means alone.
    """

    def __init__(self, loss: LossConfig, device: torch.device, begun: list[float] | None = None):
        self._loss = loss
        # float64, on the device: this rank's sums so far, in the order of MEANS, and the sums of the weights of all
        # pairs and of those that are no ties
        begun = begun or [0.0] * (len(MEANS) + 2)
        if len(begun) == len(MEANS) + 1:     # of a checkpoint from before ties were kept
            begun = [*begun, begun[-1]]
        self.tensor = torch.tensor(begun, dtype=torch.float64, device=device)
        self._has_rewards = True

    def add(self, pairs: PairLogps, per_pair_loss: Tensor, weight: Tensor) -> None:
        """pairs, per_pair_loss and weight: (B,); a filler has weight 0."""
        with torch.no_grad():
            found = rewards(pairs, self._loss)
            self._has_rewards = found is not None
            zero = torch.zeros_like(pairs.policy_chosen)
            chosen, rejected = found if found is not None else (zero, zero)
            margin = chosen - rejected
            accuracy = (margin > 0).double() + 0.5 * (margin == 0).double()     # a tie is half right
            kl, drift = (zero if value is None else value
                         for value in (pairs.kl_per_token, pairs.chosen_drift_per_token))
            rows = torch.stack([per_pair_loss, chosen, rejected, margin, accuracy, pairs.policy_chosen,
                                pairs.policy_rejected, kl, drift])
            weight = weight.double()
            decided = weight if pairs.tie is None else weight * (pairs.tie == 0)
            weights = torch.stack([weight if name in OF_ALL else decided for name in MEANS] + [weight, decided])
            self.tensor += (torch.cat([rows.double(), rows.new_ones(2, len(weight)).double()]) * weights).sum(1)

    def total(self, world: World) -> list[float]:
        """The sums over all ranks, with which one rank may begin. All ranks call it."""
        return world.sum(self.tensor).tolist()

    def means(self, world: World, mine: Tensor | None = None) -> dict[str, float]:
        """{name: mean over all ranks' pairs}, without what the loss has none of, and of ties alone without what only
        other pairs have. All ranks call it. mine: this rank's sums, if they are on the CPU already."""
        *sums, weight, decided = world.sum(self.tensor if mine is None else mine).tolist()
        known = {"rewards/": self._has_rewards, "reference/": self._loss.needs_reference,
                 "logps/rejected": self._loss.uses_rejected}
        unknown = tuple(prefix for prefix, is_known in known.items() if not is_known)
        return {name: value / over for name, value in zip(MEANS, sums, strict=True)
                if not name.startswith(unknown) and (over := weight if name in OF_ALL else decided)}
