"""What the kernels of models/fused_kernels.py compute, in torch's own operations: at least fp32 inside, rounded
once."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_dist.models.fused import Kernels


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    return (wide(x) * scale * weight).to(x.dtype), scale


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor,
                  wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    normalized, upstream = wide(x) * scale, wide(grad) * weight
    of_x = (upstream - normalized * (upstream * normalized).mean(-1, keepdim=True)) * scale
    of_weight = (wide(grad) * normalized).flatten(0, -2).sum(0)
    return of_x.to(x.dtype) if wanted[0] else None, of_weight.to(weight.dtype) if wanted[1] else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, s = wide(gate), torch.sigmoid(wide(gate))
    return (wide(grad) * wide(up) * s * (1 + g * (1 - s))).to(gate.dtype), (wide(grad) * g * s).to(up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    half, c, s = x.shape[-1] // 2, wide(cos)[:, None], wide(sin)[:, None]
    if transposed:
        turned = wide(x) * s
        return (wide(x) * c + torch.cat([turned[..., half:], -turned[..., :half]], -1)).to(x.dtype)
    return (wide(x) * c + torch.cat([-wide(x)[..., half:], wide(x)[..., :half]], -1) * s).to(x.dtype)


PLAIN = Kernels(norm, norm_backward, swiglu, swiglu_backward, rotate)
