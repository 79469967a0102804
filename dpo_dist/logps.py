"""The one definition of a log-prob: from hidden states to log p of given tokens, and from tokens to pairs.

Policy and every reference engine go through here, so they cannot disagree about masks, dtypes or the head.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.config import LossConfig
from dpo_dist.preference import PackedBatch, PairLogps, TokenLogps

LOGITS_AT_ONCE = 2**24          # elements of the logits that exist at once, 64 MiB in fp32, whatever the vocabulary
NARROWEST_BLOCK = 256           # columns: a matrix product over fewer wastes its time


class LogpHead(nn.Module):
    """Stands in a causal LM's `lm_head`, owning the same parameters (so names and checkpoints do not change).

    Called with targets it returns (logps, log_collision), each (N,), without ever holding [N, V] logits; log_collision is empty
    unless asked for. Called without targets, plain logits. Tensors in and out: ZeRO-3's hooks see nothing else.
    """

    def __init__(self, lm_head: nn.Module, scale: float = 1.0, softcap: float | None = None):
        super().__init__()
        self.weight: Any = lm_head.weight
        self.bias: Any = getattr(lm_head, "bias", None)
        self.scale, self.softcap = scale, softcap

    def forward(self, hidden: Tensor, targets: Tensor | None = None, collision: bool = False) -> Any:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        keep = torch.is_grad_enabled()                   # always off inside the function, so asked here
        return _BlockwiseLogps.apply(hidden, self.weight, self.bias, targets, self.scale, self.softcap, collision, keep)


class _BlockwiseLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target] per row, over blocks of the vocabulary; in backward each block's logits are computed again, but
    for the last block's, which are kept: backward begins with them, when one block of logits must exist anyhow.

    The parameters themselves are kept on ctx, not through save_for_backward: ZeRO-3 frees them after forward and gathers the
    same objects again before backward. One function call a pack means one gather a direction.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                scale: float, softcap: float | None, collision: bool, keep: bool) -> tuple[Tensor, Tensor]:
        ctx.weight, ctx.bias, ctx.scale, ctx.softcap = weight, bias, scale, softcap
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        target_logit = torch.zeros(len(targets), dtype=wide, device=hidden.device)
        normalizer = torch.full_like(target_logit, -torch.inf)
        twice = torch.full_like(target_logit, -torch.inf)                    # log of the sum over the vocabulary of exp(2 logit)
        kept = None
        for block in _blocks(len(targets), len(weight)):
            kept = logits = None                                             # a block is gone before the next is made
            logits, _ = kept = _logits(hidden, weight, bias, block, scale, softcap)
            normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
            column, inside = _within(block, targets)
            target_logit += logits.gather(1, column[:, None])[:, 0] * inside
            if collision:
                twice = torch.logaddexp(twice, (2 * logits).logsumexp(-1))
        ctx.kept = kept if keep else None
        ctx.save_for_backward(hidden, targets, normalizer)
        log_collision = twice - 2 * normalizer if collision else normalizer.new_empty(0)
        ctx.mark_non_differentiable(log_collision)
        return target_logit - normalizer, log_collision

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        hidden, targets, normalizer = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype)
        grad_weight = torch.empty_like(weight) if weight.requires_grad else None
        grad_bias = torch.empty_like(bias) if bias is not None and bias.requires_grad else None
        kept, ctx.kept = ctx.kept, None
        for block in reversed(_blocks(len(targets), len(weight))):
            logits, slope = kept or _logits(hidden, weight, bias, block, ctx.scale, ctx.softcap)
            column, inside = _within(block, targets)
            d = logits.sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])           # d logp / d logits = onehot - softmax
            d.scatter_add_(1, column[:, None], (grad * inside)[:, None])
            if isinstance(slope, Tensor) or slope != 1.0:
                d.mul_(slope)
            d_low = d.to(hidden.dtype)
            grad_hidden += d_low @ weight[block]                                       # products in the weights' dtype, sum in fp32
            if grad_weight is not None:
                torch.mm(d_low.t(), hidden, out=grad_weight[block])
            if grad_bias is not None:
                grad_bias[block] = d.sum(0)
            kept = logits = d = d_low = None
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None, None


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    """Columns of the logits that are computed together: the whole vocabulary where it is small enough."""
    width = max(NARROWEST_BLOCK, LOGITS_AT_ONCE // max(1, rows))
    return [slice(at, min(at + width, vocabulary)) for at in range(0, vocabulary, width)]


def _within(block: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(column in the block, whether the target lies there); a column in range for those that do not."""
    inside = (targets >= block.start) & (targets < block.stop)
    return (targets - block.start).clamp(0, block.stop - block.start - 1), inside


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, scale: float,
            softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """A block of the final logits in fp32 (or fp64), and their derivative by the head's raw output."""
    logits = nn.functional.linear(hidden, weight[block], None if bias is None else bias[block])
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, scale
    bounded = torch.tanh(logits / softcap)
    return softcap * bounded, scale * (1 - bounded * bounded)


# --------------------------------------------------------------------------------------------------- from tokens to pairs


def sequence_sums(values: Tensor, batch: PackedBatch, keep: Tensor | None = None) -> Tensor:
    """Sums of (N,) token values by sequence, (S,) float64: a margin is a small difference of large sums. `keep` (N,) scales tokens."""
    values = values.double() if keep is None else values.double() * keep
    return values.new_zeros(batch.n_sequences).index_add(0, batch.sequence, values)


def pair_logps(batch: PackedBatch, policy: TokenLogps, reference: Tensor | None, loss: LossConfig,
               mean_chosen_tokens: Tensor | float) -> PairLogps:
    """PairLogps of a pack from its tokens' log-probs: policy with gradient, reference (N,) or None, both in nats.

    loss.ld_alpha: LD-DPO (arXiv 2409.06411, eq. 9): tokens beyond the pair's shorter completion count by that factor.
    loss.wpo: WPO (arXiv 2406.11827, eq. 4): the pair's weight is its length-normalized likelihood under the policy, relative to
    the probability that two samples at a position agree, at most 1.
    """
    keep = None
    if loss.ld_alpha is not None:
        shorter = torch.minimum(batch.lengths[batch.chosen], batch.lengths[batch.rejected])
        public = batch.lengths.clone().scatter_(0, batch.chosen, shorter).scatter_(0, batch.rejected, shorter)
        keep = torch.where(batch.offset < public[batch.sequence], 1.0, loss.ld_alpha)
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
        chosen_tokens=tokens[batch.chosen], rejected_tokens=tokens[batch.rejected],
        strength=batch.strength, mean_chosen_tokens=mean_chosen_tokens, wpo_weight=wpo,
        whole_chosen=None if whole is None else whole[batch.chosen],
        whole_rejected=None if whole is None else whole[batch.rejected],
        kl_per_token=kl, chosen_drift_per_token=chosen_drift)


def drift(batch: PackedBatch, policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """How far the policy is from the reference on each pair, from (N,) log-probs: (KL estimate, chosen drift), each (B,), nats a token.

    KL estimate: the mean over the pair's completion tokens of exp(r) - 1 - r with r = log reference - log policy, Schulman's k3
    (joschu.net/blog/kl-approx.html), which is never negative. k3 estimates KL(policy || reference) on tokens that the policy drew; these
    were drawn by whoever wrote the data, so it is a proxy: good for ranking runs on the same pairs, not a KL to be quoted.
    Chosen drift: the mean over the chosen completion's tokens of log policy - log reference; below 0, the policy unlearns what it was
    shown as good. Every token counts in full, whatever loss.ld_alpha is.
    """
    r = (reference - policy).detach().double()
    tokens = batch.lengths.double()
    k3, gained = sequence_sums(r.expm1() - r, batch), -sequence_sums(r, batch)
    kl = (k3[batch.chosen] + k3[batch.rejected]) / (tokens[batch.chosen] + tokens[batch.rejected])
    return kl, gained[batch.chosen] / tokens[batch.chosen]


def plain_token_logps(model: nn.Module, prompt_ids: Tensor, completion_ids: Tensor) -> Tensor:
    """(C,) log-probs of one completion after one prompt, by the model's own forward: no packing, no chunks, no cleverness.

    The written-out definition that the packed path is held against, in tests and at step 0.
    """
    ids = torch.cat([prompt_ids, completion_ids])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1:-1]
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]
