"""A policy small enough to know its optimum: a softmax over K answers to each of P prompts, trained with the losses of
dpo_dist on judgments whose truth is known. frontier.py and tests/unit/test_simulated_preferences.py use it.

Judgments are numbers (P, M, 3): of the M = K (K - 1) / 2 pairs of answers i < j of each prompt, how often, or with what
probability, i wins, j wins and neither does. Probabilities make the population's loss, counts a sample's.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.losses import preference_loss
from dpo_dist.types import PairLogps


@dataclass(frozen=True)
class Toy:
    """reference: (P, K) log-probs in nats; reward: (P, K), what annotators judge by. Both float64."""

    reference: Tensor
    reward: Tensor

    @staticmethod
    def drawn(prompts: int, answers: int, seed: int, spread: float = 1.0) -> Toy:
        """Reference logits and rewards from normal distributions."""
        g = torch.Generator().manual_seed(seed)
        logits, reward = torch.randn(2, prompts, answers, generator=g, dtype=torch.float64)
        return Toy(logits.log_softmax(-1), spread * reward)

    @property
    def pairs(self) -> tuple[list[int], list[int]]:
        """(M,) i and (M,) j of the pairs of answers."""
        i, j = zip(*combinations(range(self.reward.shape[1]), 2), strict=True)
        return list(i), list(j)

    @property
    def difference(self) -> Tensor:
        """(P, M) reward of i less that of j."""
        i, j = self.pairs
        return self.reward[:, i] - self.reward[:, j]

    def optimum(self, beta: float) -> Tensor:
        """(P, K) log-probs of the closed form, pi_ref · exp(r / beta) / Z (arXiv 2305.18290, eq. 4)."""
        return (self.reference + self.reward / beta).log_softmax(-1)

    def kl(self, policy: Tensor) -> float:
        """Nats: KL(policy || reference), the mean over prompts."""
        return float((policy.exp() * (policy - self.reference)).sum(-1).mean())

    def value(self, policy: Tensor) -> float:
        """The expected reward, the mean over prompts."""
        return float((policy.exp() * self.reward).sum(-1).mean())


# ------------------------------------------------------------------------------------------------------------ judgments


def bradley_terry(difference: Tensor) -> Tensor:
    """(..., 3) probabilities that i wins, that j does, and 0 for ties."""
    return torch.stack([difference.sigmoid(), (-difference).sigmoid(), torch.zeros_like(difference)], -1)


def rao_kupper(difference: Tensor, nu: float) -> Tensor:
    """(..., 3) probabilities under Rao and Kupper (1967)."""
    i, j = difference.exp(), torch.ones_like(difference)
    return torch.stack([i / (i + nu * j), j / (nu * i + j), (nu**2 - 1) * i * j / ((i + nu * j) * (nu * i + j))], -1)


def davidson(difference: Tensor, nu: float) -> Tensor:
    """(..., 3) probabilities under Davidson (1970), with 2ν as in arXiv 2409.17431."""
    parts = torch.stack([difference.exp(), torch.ones_like(difference), 2 * nu * (difference / 2).exp()], -1)
    return parts / parts.sum(-1, keepdim=True)


def flipped(judgments: Tensor, share: float) -> Tensor:
    """The judgments with this share of the winners named wrongly."""
    i, j, tie = judgments.unbind(-1)
    return torch.stack([(1 - share) * i + share * j, (1 - share) * j + share * i, tie], -1)


def sampled(judgments: Tensor, each: int, seed: int) -> Tensor:
    """(P, M, 3) counts of so many judgments of every pair, drawn by these probabilities."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(judgments.reshape(-1, 3), each, replacement=True, generator=g)
    return torch.nn.functional.one_hot(drawn, 3).sum(1).reshape(judgments.shape).double()


# ------------------------------------------------------------------------------------------------------------- training


def pair_logps(toy: Toy, policy: Tensor, strength: Tensor | None = None) -> PairLogps:
    """The PairLogps of every outcome of every pair, P · M · 3 in the order of judgments. strength: (P, M, 3)."""
    i, j = toy.pairs
    chosen, rejected = (torch.tensor(at) for at in ([i, j, i], [j, i, j]))                # (3, M)

    def of(values: Tensor, at: Tensor) -> Tensor:
        return values[:, at].transpose(1, 2).reshape(-1)

    ones = torch.ones(policy.shape[0] * 3 * len(i), dtype=policy.dtype)
    tie = torch.tensor([0, 0, 1], dtype=torch.uint8).repeat(len(ones) // 3)
    return PairLogps(of(policy, chosen), of(policy, rejected), of(toy.reference, chosen), of(toy.reference, rejected),
                     ones, ones, ones if strength is None else strength.reshape(-1), 1.0, tie=tie)


def mean_loss(toy: Toy, policy: Tensor, judgments: Tensor, loss: LossConfig, strength: Tensor | None = None) -> Tensor:
    """The scalar that training lowers: the mean over judgments, weighted by how often each was made."""
    weight = judgments.reshape(-1)
    made = weight > 0
    per_pair = preference_loss(pair_logps(toy, policy, strength), loss)
    return (weight[made] * per_pair[made]).sum() / weight.sum()


def fitted(toy: Toy, judgments: Tensor, loss: LossConfig, strength: Tensor | None = None) -> Tensor:
    """(P, K) log-probs of the policy with the lowest loss, from the reference on, by L-BFGS over all judgments."""
    loss = resolve_loss(loss)
    assert loss.beta is not None
    moved = torch.zeros_like(toy.reference, requires_grad=True)      # beta times the change of the logits
    optimizer = torch.optim.LBFGS([moved], max_iter=2000, max_eval=4000, history_size=50, tolerance_grad=1e-8,
                                  tolerance_change=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = (toy.reference + moved / loss.beta).log_softmax(-1)
        value = mean_loss(toy, policy, judgments, loss, strength)
        value.backward()
        return value

    optimizer.step(closure)                                          # type: ignore[arg-type]
    return (toy.reference + moved.detach() / loss.beta).log_softmax(-1)


def implied_reward(toy: Toy, policy: Tensor, beta: float) -> Tensor:
    """(P, K) beta · log(policy / reference), 0 for each prompt's first answer: rewards are known up to a constant."""
    reward = beta * (policy - toy.reference)
    return reward - reward[:, :1]


def total_variation(policy: Tensor, other: Tensor) -> Tensor:
    """(P,) half the sum of |p - q|, from log-probs."""
    return (policy.exp() - other.exp()).abs().sum(-1) / 2


def reward_errors(toy: Toy, policy: Tensor, judgments: Tensor, loss: LossConfig) -> Tensor:
    """(P, K - 1) standard errors of implied_reward's entries but the first: the root of the diagonal of the inverse of
    the observed Fisher information, the second derivative of the log-likelihood of each prompt's judgments."""
    loss = resolve_loss(loss)
    assert loss.beta is not None
    i, j = toy.pairs
    pairs = pair_logps(toy, policy)
    chosen = pairs.policy_chosen.clone().requires_grad_()
    value = preference_loss(PairLogps(**{**vars(pairs), "policy_chosen": chosen}), loss)
    slope, = torch.autograd.grad(value.sum(), chosen, create_graph=True)
    curvature, = torch.autograd.grad(slope.sum(), chosen)            # of a reward difference: by beta² smaller
    info = (curvature.reshape(judgments.shape) / loss.beta**2 * judgments).sum(-1)                # (P, M)
    at = torch.zeros(len(i), toy.reward.shape[1], dtype=policy.dtype)
    at[range(len(i)), i], at[range(len(i)), j] = 1, -1
    matrix = torch.einsum("pm,mk,ml->pkl", info, at, at)[:, 1:, 1:]
    return torch.linalg.inv(matrix).diagonal(dim1=1, dim2=2).sqrt()
