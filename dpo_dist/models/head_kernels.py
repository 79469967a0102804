"""The head's two Triton kernels: each reads a block of logits once, where torch's operations pass over it ten times.

Imported only on GPUs. Tests compare them with head.py's plain functions.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS_AT_ONCE = 2048                     # of a row, in registers: 8 each for 256 threads
WARPS = 8


@triton.jit
def _bounded(raw, scale, softcap, HAS_CAP: tl.constexpr):
    """(logit, its derivative by the head's raw output)."""
    x = raw * scale
    if HAS_CAP:
        bounded = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0            # tanh
        return softcap * bounded, scale * (1.0 - bounded * bounded)
    return x, x * 0.0 + scale


@triton.jit
def _absorb(logits, row_stride, columns, first, targets, target_logit, normalizer, twice, scale, softcap,
            HAS_CAP: tl.constexpr, COLLISION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    top = -float("inf")
    total = 0.0
    total_twice = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x, _ = _bounded(tl.load(base + at, mask=inside, other=0.0).to(tl.float32), scale, softcap, HAS_CAP)
        x = tl.where(inside, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        shrink = tl.exp(top - higher)
        e = tl.exp(x - higher)
        total = total * shrink + tl.sum(e, 0)
        if COLLISION:
            total_twice = total_twice * shrink * shrink + tl.sum(e * e, 0)
        top = higher
    old = tl.load(normalizer + row)
    new = top + tl.log(total)
    high = tl.maximum(old, new)
    tl.store(normalizer + row, high + tl.log(tl.exp(old - high) + tl.exp(new - high)))
    if COLLISION:
        old = tl.load(twice + row)
        new = 2.0 * top + tl.log(total_twice)
        high = tl.maximum(old, new)
        tl.store(twice + row, high + tl.log(tl.exp(old - high) + tl.exp(new - high)))
    column = tl.load(targets + row) - first
    if (column >= 0) & (column < columns):
        x, _ = _bounded(tl.load(base + column).to(tl.float32), scale, softcap, HAS_CAP)
        tl.store(target_logit + row, x)


@triton.jit
def _differentiate(logits, row_stride, columns, first, targets, normalizer, grad, scale, softcap, HAS_CAP: tl.constexpr,
                   BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    where = logits + row * row_stride + at
    x, slope = _bounded(tl.load(where, mask=inside, other=0.0).to(tl.float32), scale, softcap, HAS_CAP)
    g = tl.load(grad + row)
    column = tl.load(targets + row) - first
    d = tl.where(at == column, g, 0.0) - g * tl.exp(x - tl.load(normalizer + row))
    tl.store(where, (d * slope).to(logits.dtype.element_ty), mask=inside)


def absorb(logits: Tensor, first: int, targets: Tensor, target_logit: Tensor, normalizer: Tensor, twice: Tensor | None,
           scale: float, softcap: float | None) -> None:
    """As head.absorb. logits (N, W) with contiguous rows; the others (N,), fp32 and int64."""
    rows, columns = logits.shape
    if rows:
        _absorb[(rows,)](logits, logits.stride(0), columns, first, targets, target_logit, normalizer,
                         normalizer if twice is None else twice, scale, 1.0 if softcap is None else softcap,
                         HAS_CAP=softcap is not None, COLLISION=twice is not None, BLOCK=_block(columns),
                         num_warps=WARPS)


def differentiate(logits: Tensor, first: int, targets: Tensor, normalizer: Tensor, grad: Tensor, scale: float,
                  softcap: float | None) -> Tensor:
    """As head.differentiate: the logits' place is taken by the gradient, in their dtype."""
    rows, columns = logits.shape
    block = _block(columns)
    if rows:
        _differentiate[(rows, triton.cdiv(columns, block))](
            logits, logits.stride(0), columns, first, targets, normalizer, grad, scale,
            1.0 if softcap is None else softcap, HAS_CAP=softcap is not None, BLOCK=block, num_warps=WARPS)
    return logits


def _block(columns: int) -> int:
    return min(COLUMNS_AT_ONCE, triton.next_power_of_2(columns))
