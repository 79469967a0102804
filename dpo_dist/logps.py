"""From log-probs of tokens to those of pairs. The policy and all reference engines use this, so they cannot disagree.

head.py goes from hidden states to the log-probs of tokens.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo_dist.config.schema import LossConfig
from dpo_dist.types import PackedBatch, PairLogps, TokenLogps


def sequence_sums(values: Tensor, batch: PackedBatch, keep: Tensor | None = None) -> Tensor:
    """Sums of (N,) token values by sequence: (S,) float64, as a margin is a small difference of large sums. `keep` (N,)
    scales tokens."""
    values = values.double() if keep is None else values.double() * keep
    return values.new_zeros(len(batch.lengths)).index_add(0, batch.sequence, values)


def pair_logps(batch: PackedBatch, policy: TokenLogps, reference: Tensor | None, loss: LossConfig,
               mean_chosen_tokens: Tensor | float) -> PairLogps:
    """PairLogps of a pack from its tokens' log-probs: policy with gradient, reference (N,) or None, both in nats.

    loss.ld_alpha: LD-DPO (arXiv 2409.06411, eq. 9): tokens beyond the pair's shorter completion count by that factor,
    where a completion is its counted tokens, one after the other.
    loss.wpo: WPO (arXiv 2406.11827, eq. 4): the pair's weight is its length-normalized likelihood under the policy,
    relative to the probability that two samples at a position agree, at most 1.
    """
    keep = None
    if loss.ld_alpha is not None:
        shorter = torch.minimum(batch.lengths[batch.chosen], batch.lengths[batch.rejected])
        public = batch.lengths.clone().scatter_(0, batch.chosen, shorter).scatter_(0, batch.rejected, shorter)
        first = batch.lengths.cumsum(0) - batch.lengths              # of each sequence, among the pack's counted tokens
        place = torch.arange(len(batch.sequence), device=first.device) - first[batch.sequence]
        keep = torch.where(place < public[batch.sequence], 1.0, loss.ld_alpha)
    sums = sequence_sums(policy.logps, batch, keep)
    whole = None if keep is None else sequence_sums(policy.logps, batch)
    reference_sums = None if reference is None else sequence_sums(reference, batch, keep)
    tokens = batch.lengths.to(torch.float64)
    wpo = None
    if loss.wpo:
        assert policy.log_collision is not None, "WPO needs the head called with collision=True"
        excess = sequence_sums(policy.logps.detach() - policy.log_collision, batch) / tokens
        wpo = (excess[batch.chosen] + excess[batch.rejected]).exp().clamp(max=1.0)
    kl, chosen_drift = (None, None) if reference is None else drift(batch, policy.logps, reference)
    return PairLogps(
        policy_chosen=sums[batch.chosen], policy_rejected=sums[batch.rejected],
        reference_chosen=None if reference_sums is None else reference_sums[batch.chosen],
        reference_rejected=None if reference_sums is None else reference_sums[batch.rejected],
        chosen_tokens=tokens[batch.chosen], rejected_tokens=tokens[batch.rejected], strength=batch.strength,
        mean_chosen_tokens=mean_chosen_tokens, wpo_weight=wpo,
        whole_chosen=None if whole is None else whole[batch.chosen],
        whole_rejected=None if whole is None else whole[batch.rejected], kl_per_token=kl,
        chosen_drift_per_token=chosen_drift, tie=batch.tie)


def drift(batch: PackedBatch, policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """How far the policy is from the reference on each pair: (KL estimate, chosen drift), each (B,), in nats a token.
    policy, reference: (N,) log-probs.

    KL estimate: the mean over the pair's completion tokens of exp(r) - 1 - r with r = log reference - log policy,
    Schulman's k3 (joschu.net/blog/kl-approx.html), which is never negative. k3 estimates KL(policy || reference) on
    tokens that the policy drew; these come from the data, so it is a proxy: good for ranking runs on the same pairs,
    not a KL to be quoted. Chosen drift: the mean over the chosen completion's tokens of log policy - log reference;
    below 0, the policy unlearns what it was shown as good. Every token counts in full, whatever loss.ld_alpha is.
    """
    r = (reference - policy).detach().double()
    tokens = batch.lengths.double()
    k3, gained = sequence_sums(r.expm1() - r, batch), -sequence_sums(r, batch)
    kl = (k3[batch.chosen] + k3[batch.rejected]) / (tokens[batch.chosen] + tokens[batch.rejected])
    return kl, gained[batch.chosen] / tokens[batch.chosen]


def plain_token_logps(model: nn.Module, prompt_ids: Tensor, completion_ids: Tensor) -> Tensor:
    """(C,) log-probs of one completion after one prompt, by the model's own forward: no packing, no blocks.

    The plain definition that the packed path is compared with, in tests and at step 0.
    """
    ids = torch.cat([prompt_ids, completion_ids])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1:-1]
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]
