"""The one definition of a log-prob: last hidden states → log p of given tokens, for the policy and every reference
engine."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_dist.models.trial import first_line, worst_error
from dpo_dist.sizing.logit_blocks import Blocks, plan_blocks

TRIAL_ERROR = 0.01                         # bf16 rounds to about 0.003


class LogpHead(nn.Module):
    """Stands in a causal LM's `lm_head`, owning the same parameters (so names and checkpoints do not change).

    Called with targets it returns (logps, log_collision), each (N,), without ever holding [N, V] logits where they are
    large; log_collision is empty unless asked for. Called without targets, plain logits. Tensors in and out: ZeRO-3's
    hooks see nothing else.
    """

    def __init__(self, lm_head: nn.Module, scale: float = 1.0, softcap: float | None = None):
        super().__init__()
        self.weight: Any = lm_head.weight
        self.bias: Any = getattr(lm_head, "bias", None)
        self.scale, self.softcap = scale, softcap

    def forward(self, hidden: Tensor, targets: Tensor | None = None, collision: bool = False) -> Any:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        blocks = plan_blocks(len(hidden), len(self.weight), self.weight.element_size(),
                             "cuda" if hidden.is_cuda else "cpu")
        keep = torch.is_grad_enabled()                   # always off inside the autograd function, so read here
        return BlockwiseLogps.apply(hidden, self.weight, self.bias, targets, self.scale, self.softcap, collision, keep,
                                    blocks, passes_for(hidden))


@contextmanager
def tempered(model: nn.Module, temperature: float) -> Iterator[None]:
    """Inside: the model's log-probs are those of what is sampled at this temperature, softmax(logits / temperature)."""
    heads = [module for module in model.modules() if isinstance(module, LogpHead)]
    assert heads, "a model that computes log-probs has a LogpHead"
    before = [(head.scale, head.softcap) for head in heads]
    try:
        for head in heads:               # softcap · tanh(scale · x / softcap) / temperature, bounded or not
            head.scale /= temperature
            head.softcap = None if head.softcap is None else head.softcap / temperature
        yield
    finally:
        for head, (scale, softcap) in zip(heads, before, strict=True):
            head.scale, head.softcap = scale, softcap


class Passes(NamedTuple):
    """The two passes over a block of logits (N, W), as `absorb` and `differentiate` below."""

    absorb: Callable[..., None]
    differentiate: Callable[..., Tensor]


class BlockwiseLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target] per row, over blocks of the vocabulary. Backward recomputes a block's logits
    unless forward kept them.

    The parameters themselves are kept on ctx, not through save_for_backward: ZeRO-3 frees them after forward and
    gathers the same objects again before backward. One function call a pack means one gather a direction.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float,
                softcap: float | None, collision: bool, keep: bool, blocks: Blocks,
                passes: Passes) -> tuple[Tensor, Tensor]:
        ctx.weight, ctx.bias, ctx.scale, ctx.softcap = weight, bias, scale, softcap
        ctx.blocks, ctx.passes = blocks, passes
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        target_logit = torch.zeros(len(targets), dtype=wide, device=hidden.device)
        normalizer = torch.full_like(target_logit, -torch.inf)
        # log of the sum of exp(2 logit)
        twice = torch.full_like(target_logit, -torch.inf) if collision else None
        kept: dict[int, Tensor] = {}
        for i, (first, end) in enumerate(blocks.spans):
            logits = None                                                    # free a block before making the next
            logits = _product(hidden, weight, bias, first, end)
            passes.absorb(logits, first, targets, target_logit, normalizer, twice, scale, softcap)
            if keep and i >= len(blocks.spans) - blocks.kept:
                kept[i] = logits
        ctx.kept = kept
        ctx.save_for_backward(hidden, targets, normalizer)
        log_collision = normalizer.new_empty(0) if twice is None else twice - 2 * normalizer
        ctx.mark_non_differentiable(log_collision)
        return target_logit - normalizer, log_collision

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        hidden, targets, normalizer = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        grad = grad.contiguous()
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype)
        grad_weight = torch.empty_like(weight) if weight.requires_grad else None
        grad_bias = torch.empty_like(bias) if bias is not None and bias.requires_grad else None
        for i, (first, end) in reversed(list(enumerate(ctx.blocks.spans))):
            logits = ctx.kept.pop(i, None)
            if logits is None:
                logits = _product(hidden, weight, bias, first, end)
            d = ctx.passes.differentiate(logits, first, targets, normalizer, grad, ctx.scale, ctx.softcap)
            if grad_bias is not None:
                grad_bias[first:end] = d.sum(0, dtype=normalizer.dtype)
            narrow = d.to(hidden.dtype)
            _add_product(grad_hidden, narrow, weight[first:end])
            if grad_weight is not None:
                torch.mm(narrow.t(), hidden, out=grad_weight[first:end])
            logits = d = narrow = None
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, *(None,) * 7


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, end: int) -> Tensor:
    """(N, end - first): a block of the head's raw output, in the weights' dtype."""
    return nn.functional.linear(hidden, weight[first:end], None if bias is None else bias[first:end])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may be wider than the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_into_fp32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@cache
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a narrow product to an fp32 sum in place, without rounding it first. The operation is
    new, so it is tried."""
    # its product, 16.25 + 2**-10, has more digits than bf16
    narrow = torch.full((16, 16), 1 + 2.0**-7, dtype=dtype, device=device)
    total = torch.full((16, 16), 2.0**-12, device=device)
    try:
        torch.addmm(total, narrow, narrow, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 16.25 + 2.0**-10 + 2.0**-12).all())


# ------------------------------------------------------------------------------------------ the two passes over a block


def passes_for(hidden: Tensor) -> Passes:
    """Triton's kernels on a GPU, torch's operations elsewhere."""
    if not hidden.is_cuda or hidden.dtype == torch.float64 or kernels_misfit(hidden.device) is not None:
        return PLAIN
    return triton_passes()


def triton_passes() -> Passes:
    """The passes of head_kernels.py. ImportError where Triton is missing."""
    from dpo_dist.models import head_kernels

    return Passes(head_kernels.absorb, head_kernels.differentiate)


@cache
def kernels_misfit(device: torch.device) -> str | None:
    """Why this GPU's head cannot use Triton's kernels, or None. They are tried: a C compiler may be missing."""
    try:
        error = trial(triton_passes(), device, torch.bfloat16)
    except Exception as problem:         # whatever Triton raises: torch's operations give the same numbers, slower
        return first_line(problem)
    return None if error < TRIAL_ERROR else f"their numbers differ by {error:.2g}"


def trial(passes: Passes, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative difference of log-probs and gradients between these passes and torch's, on a small head."""
    made = torch.Generator().manual_seed(0)
    rows, size, vocabulary = 9, 64, 5003
    hidden, weight = (torch.randn(n, size, generator=made).to(device, dtype).requires_grad_()
                      for n in (rows, vocabulary))
    targets = torch.randint(vocabulary, (rows,), generator=made).to(device)
    upstream = torch.randn(rows, generator=made).to(device)

    def run(passes: Passes) -> list[Tensor]:
        with torch.enable_grad():
            values, _ = BlockwiseLogps.apply(hidden, weight, None, targets, 0.3, None, False, True,
                                             Blocks(vocabulary, 2304, 2), passes)
            return [values.detach(), *torch.autograd.grad(values, (hidden, weight), upstream)]

    return worst_error(run(passes), run(PLAIN))


def absorb(logits: Tensor, first: int, targets: Tensor, target_logit: Tensor, normalizer: Tensor, twice: Tensor | None,
           scale: float, softcap: float | None) -> None:
    """Adds a block (N, W) of raw logits, columns `first` on, to what earlier blocks gave, all (N,): the log of the sum
    of exp(logit) and of exp(2 logit), and the logit of each row's target once its block comes."""
    bounded, _ = _bounded(logits, scale, softcap)
    normalizer.copy_(torch.logaddexp(normalizer, bounded.logsumexp(-1)))
    column, inside = _within(first, logits.shape[1], targets)
    target_logit += bounded.gather(1, column[:, None])[:, 0] * inside
    if twice is not None:
        twice.copy_(torch.logaddexp(twice, (2 * bounded).logsumexp(-1)))


def differentiate(logits: Tensor, first: int, targets: Tensor, normalizer: Tensor, grad: Tensor, scale: float,
                  softcap: float | None) -> Tensor:
    """(N, W): d (sum of grad * logp) / d (the head's raw output). May overwrite the block of logits."""
    bounded, slope = _bounded(logits, scale, softcap)
    column, inside = _within(first, logits.shape[1], targets)
    d = bounded.sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])           # d logp / d logits = onehot - softmax
    d.scatter_add_(1, column[:, None], (grad * inside)[:, None])
    return d if softcap is None and scale == 1.0 else d.mul_(slope)


PLAIN = Passes(absorb, differentiate)


def _within(first: int, columns: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(column in the block, whether the target lies there); a column in range for those that do not."""
    inside = (targets >= first) & (targets < first + columns)
    return (targets - first).clamp(0, columns - 1), inside


def _bounded(raw: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """A block of the final logits in fp32 (or fp64), and their derivative by the head's raw output."""
    logits = raw.float() if raw.dtype != torch.float64 else raw
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, scale
    bounded = torch.tanh(logits / softcap)
    return softcap * bounded, scale * (1 - bounded * bounded)
