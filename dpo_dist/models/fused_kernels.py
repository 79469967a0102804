"""Triton kernels for SwiGLU and rotary embedding, one pass each way, and torch's fused RMSNorm. Imported only on GPUs.

Nothing is written in place: a product that selective recomputing keeps must stay as it was. Arithmetic is in fp32 (fp64
for fp64) and rounded once at the end.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048                                    # of a SwiGLU program: 8 each for 256 threads


@triton.jit
def _swiglu(gate, up, out, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + at, mask=inside, other=0.0).to(WIDE)
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad, gate, up, grad_gate, grad_up, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    d = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
    g = tl.load(gate + at, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + at, mask=inside, other=0.0).to(WIDE)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(grad_gate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (d * g * s).to(grad_up.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, cos, sin, out, tokens, heads, half, x_row, x_head, x_token, x_dim, out_row, out_head, out_token, out_dim,
            angle_row, angle_token, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
            HALF: tl.constexpr):
    """HEADS heads of one token: halves (a, b) become (a cos - b sin, b cos + a sin), or their transposed rotation."""
    row = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    dim = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (dim < half)
    angle = row * angle_row + token * angle_token + dim
    a = x + row * x_row + token * x_token + head * x_head + dim * x_dim
    first = tl.load(a, mask=inside, other=0.0).to(WIDE)
    second = tl.load(a + half * x_dim, mask=inside, other=0.0).to(WIDE)
    cos_first = tl.load(cos + angle, mask=dim < half, other=0.0).to(WIDE)
    cos_second = tl.load(cos + angle + half, mask=dim < half, other=0.0).to(WIDE)
    sin_first = tl.load(sin + angle, mask=dim < half, other=0.0).to(WIDE)
    sin_second = tl.load(sin + angle + half, mask=dim < half, other=0.0).to(WIDE)
    if TRANSPOSED:
        new_first = first * cos_first + second * sin_second
        new_second = second * cos_second - first * sin_first
    else:
        new_first = first * cos_first - second * sin_first
        new_second = second * cos_second + first * sin_second
    b = out + row * out_row + token * out_token + head * out_head + dim * out_dim
    tl.store(b, new_first.to(out.dtype.element_ty), mask=inside)
    tl.store(b + half * out_dim, new_second.to(out.dtype.element_ty), mask=inside)


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if n := gate.numel():
        _swiglu[(triton.cdiv(n, ELEMENTS),)](gate, up, out, n, WIDE=_wide(gate.dtype), BLOCK=ELEMENTS, num_warps=8)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if n := gate.numel():
        _swiglu_backward[(triton.cdiv(n, ELEMENTS),)](grad, gate, up, grad_gate, grad_up, n, WIDE=_wide(gate.dtype),
                                                      BLOCK=ELEMENTS, num_warps=8)
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """x (B, H, T, D) rotated by cos, sin (B or 1, T, D), or rotated back. The result has x's memory layout."""
    rows, heads, tokens, width = x.shape
    out, half = torch.empty_like(x), width // 2
    cos, sin = cos.contiguous(), sin.contiguous()
    if x.numel():
        at_once = min(triton.next_power_of_2(heads), max(1, ELEMENTS // triton.next_power_of_2(half)))
        _rotate[(rows * tokens, triton.cdiv(heads, at_once))](
            x, cos, sin, out, tokens, heads, half, *x.stride(), *out.stride(), cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1), TRANSPOSED=transposed, WIDE=_wide(x.dtype), HEADS=at_once, HALF=triton.next_power_of_2(half),
            num_warps=4)
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) · weight, 1 / rms(x) in fp32) over the last dimension."""
    return torch.ops.aten._fused_rms_norm(x.contiguous(), [x.shape[-1]], weight, eps)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor,
                  wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of weight; `scale` as `norm` gave it. torch's kernel reads contiguous rows."""
    return torch.ops.aten._fused_rms_norm_backward(grad.contiguous(), x.contiguous(), [x.shape[-1]], scale, weight,
                                                   list(wanted))
