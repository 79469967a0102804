"""SwiGLU and rotary embedding through Triton's kernels against torch's operations, in Triton's interpreter; run by
test_fused.py."""
from __future__ import annotations

import itertools

import plain_kernels as plain
import torch

from dpo_dist.models import fused_kernels

# the interpreter cuts bf16 off instead of rounding
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def close(name: str, ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype, name
    error = ((ours - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30)).item()
    assert error < BOUND[wanted.dtype], f"{name} differs by {error:.2g}"


def check_swiglu(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    gate, up, grad = (3 * torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2] if strided
                      else 3 * torch.randn(shape).to(dtype)
                      for _ in range(3))
    kept = [x.clone() for x in (gate, up, grad)]
    close(f"swiglu {shape}", fused_kernels.swiglu(gate, up), plain.swiglu(gate, up))
    for ours, wanted in zip(fused_kernels.swiglu_backward(grad, gate, up), plain.swiglu_backward(grad, gate, up),
                            strict=True):
        close(f"swiglu backward {shape}", ours, wanted)
    assert all(torch.equal(a, b) for a, b in zip(kept, (gate, up, grad), strict=True)), "written in place"


def check_rotary(rows: int, tokens: int, heads: int, width: int, dtype: torch.dtype, seen: bool, shared: bool) -> None:
    x = torch.randn(rows, tokens, heads, width).to(dtype)
    x = x.transpose(1, 2) if seen else x.transpose(1, 2).contiguous()
    cos, sin = (torch.randn(1 if shared else rows, tokens, width).to(dtype) for _ in range(2))
    kept = x.clone()
    for transposed in (False, True):
        ours = fused_kernels.rotate(x, cos, sin, transposed)
        close(f"rotary {tuple(x.shape)}, back: {transposed}", ours, plain.rotate(x, cos, sin, transposed))
        assert ours.stride() == x.stride(), "attention would copy it"
    assert torch.equal(kept, x), "written in place"


def main() -> None:
    torch.manual_seed(0)
    for dtype in BOUND:
        for shape, strided in (((1, 7, 48), False), ((5, 2048), False), ((2, 3, 683), False), ((3, 40), True),
                               ((0, 8), False)):
            check_swiglu(shape, dtype, strided)
        check_rotary(1, 0, 4, 8, dtype, True, True)
        check_rotary(1, 2, 40, 128, dtype, True, True)                     # more heads than one program takes
    for heads, width, seen, shared in itertools.product((1, 6), (8, 80), (True, False), (True, False)):
        check_rotary(2, 3, heads, width, torch.float32, seen, shared)
    print("the kernels agree")


if __name__ == "__main__":
    main()
