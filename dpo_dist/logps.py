"""The one definition of a log-prob: from hidden states to log p of given tokens, and from tokens to pairs.

Policy and every reference engine go through here, so they cannot disagree about masks, dtypes or the head.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.config import LossConfig
from dpo_dist.preference import PackedBatch, PairLogps, TokenLogps

HEAD_CHUNK_TOKENS = 1024       # rows of logits that exist at once: 1024 x V fp32, 0.5 GiB at V = 128k


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
        return _ChunkedLogps.apply(hidden, self.weight, self.bias, targets, self.scale, self.softcap, collision, keep)


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target] per row, chunk by chunk; in backward each chunk's logits are computed again, but for the last
    chunk's, which are kept: backward begins with them, when one chunk of logits must exist anyhow.

    The parameters themselves are kept on ctx, not through save_for_backward: ZeRO-3 frees them after forward and gathers the
    same objects again before backward. One function call a pack means one gather a direction.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                scale: float, softcap: float | None, collision: bool, keep: bool) -> tuple[Tensor, Tensor]:
        ctx.weight, ctx.bias, ctx.scale, ctx.softcap = weight, bias, scale, softcap
        logps = torch.empty(len(targets), dtype=torch.float32 if hidden.dtype != torch.float64 else torch.float64, device=hidden.device)
        log_collision = torch.empty_like(logps) if collision else logps.new_empty(0)
        normalizer = torch.empty_like(logps)
        for rows in _chunks(len(targets)):
            logits, slope = _logits(hidden[rows], weight, bias, scale, softcap)
            normalizer[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalizer[rows]
            if collision:
                log_collision[rows] = (2 * logits).logsumexp(-1) - 2 * normalizer[rows]
        ctx.last_chunk = (logits, slope) if keep and len(targets) else None
        ctx.save_for_backward(hidden, targets, normalizer)
        ctx.mark_non_differentiable(log_collision)
        return logps, log_collision

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        hidden, targets, normalizer = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=normalizer.dtype) if weight.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=normalizer.dtype) if bias is not None and bias.requires_grad else None
        kept, ctx.last_chunk = ctx.last_chunk, None
        for rows in reversed(_chunks(len(targets))):
            logits, slope = kept or _logits(hidden[rows], weight, bias, ctx.scale, ctx.softcap)
            kept = None
            d = logits.sub_(normalizer[rows, None]).exp_().mul_(-grad[rows, None])     # d logp / d logits = onehot - softmax
            d.scatter_add_(1, targets[rows, None], grad[rows, None])
            if isinstance(slope, Tensor) or slope != 1.0:
                d = d * slope
            d_low = d.to(hidden.dtype)
            grad_hidden[rows] = d_low @ weight
            if grad_weight is not None:
                grad_weight += d_low.t() @ hidden[rows]                                # product in the weights' dtype, sum in fp32
            if grad_bias is not None:
                grad_bias += d.sum(0)
        return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype),
                None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None, None, None)


def _chunks(n: int) -> list[slice]:
    return [slice(at, min(at + HEAD_CHUNK_TOKENS, n)) for at in range(0, n, HEAD_CHUNK_TOKENS)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Final logits in fp32 (or fp64), and their derivative by the head's raw output."""
    logits = nn.functional.linear(hidden, weight, bias)
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
    return PairLogps(
        policy_chosen=sums[batch.chosen], policy_rejected=sums[batch.rejected],
        reference_chosen=None if reference_sums is None else reference_sums[batch.chosen],
        reference_rejected=None if reference_sums is None else reference_sums[batch.rejected],
        chosen_tokens=tokens[batch.chosen], rejected_tokens=tokens[batch.rejected],
        strength=batch.strength, mean_chosen_tokens=mean_chosen_tokens, wpo_weight=wpo,
        whole_chosen=None if whole is None else whole[batch.chosen],
        whole_rejected=None if whole is None else whole[batch.rejected])


def plain_token_logps(model: nn.Module, prompt_ids: Tensor, completion_ids: Tensor) -> Tensor:
    """(C,) log-probs of one completion after one prompt, by the model's own forward: no packing, no chunks, no cleverness.

    The written-out definition that the packed path is held against, in tests and at step 0.
    """
    ids = torch.cat([prompt_ids, completion_ids])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1:-1]
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]
