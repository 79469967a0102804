"""Variable-length attention kernels of a GPU: which one computes the packs, found by trying, and why not a faster
one."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from dpo_dist.models.trial import first_line, worst_error

# (q (T, H, D), k, v (K, Hkv, D), starts of queries and of keys (S + 1,) int32, most queries, most keys, scale, window)
# -> (T, H, D). Causal, aligned at the lower right where keys outnumber queries; a query sees at most `window` keys,
# itself included.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float | None, int | None], Tensor]

# of o, dq, dk, dv relative to fp32, in bf16: a wrong mask or a wrong head gives more than 0.1
TRIAL_ERROR = 0.02


@dataclass(frozen=True)
class Kernel:
    name: str
    attend: Attend


@dataclass(frozen=True)
class Chosen:
    """The kernel that is used, None where no kernel is; and why each faster one is not."""

    kernel: Kernel | None
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        name = self.kernel.name if self.kernel else "one masked call for each prompt and branch, which is slow"
        return name + (f" ({'; '.join(self.passed_over)})" if self.passed_over else "")


@cache
def choose_kernel(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> Chosen:
    """The fastest kernel that is here and right, tried on a small pack of this many heads, forward and backward."""
    if device.type != "cuda":
        return Chosen(None, ("not a GPU",))
    if dtype not in (torch.bfloat16, torch.float16):
        return Chosen(None, (f"the kernels compute in bf16, not in {str(dtype).removeprefix('torch.')}",))
    reasons = []
    for name, load in CANDIDATES.items():
        try:
            attend = load()
            error = trial(attend, device, dtype, heads, key_heads, head_dim)
        except Exception as problem:                     # any error of a kernel rules it out
            reasons.append(f"{name}: {first_line(problem)}")
            continue
        if error < TRIAL_ERROR:
            return Chosen(Kernel(name, attend), tuple(reasons))
        reasons.append(f"{name}: its numbers differ by {error:.2g}")
    return Chosen(None, tuple(reasons))


def trial(attend: Attend, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> float:
    """The worst relative error of output and gradients against fp32, for sequences with as many keys as queries, with
    more, and of one token."""
    queries, keys = [37, 130, 1, 64], [37, 300, 1, 65]
    made = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), heads), (sum(keys), key_heads), (sum(keys), key_heads), (sum(queries), heads)]
    q, k, v, grad = (torch.randn(*shape, head_dim, generator=made).to(device, dtype) for shape in shapes)
    starts = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (queries, keys)]

    def run(attend: Attend, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = attend(inputs[0], inputs[1], inputs[2], starts[0], starts[1], max(queries), max(keys), head_dim**-0.5,
                         None)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    return worst_error(run(attend, dtype), run(plain, torch.float32))


def plain(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int,
          scale: float | None, window: int | None) -> Tensor:
    """What the kernels compute, written out: each sequence by itself."""
    out = []
    for (a, b), (c, d) in zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True):
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
        seen = visible_keys(b - a, d - c, window, q.device)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: causal, aligned at the lower right; at most `window` keys a query, itself included."""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return causal if window is None else causal.triu(keys - queries - window + 1)


# ------------------------------------------------------------------------------------------------------- the candidates


def _flash_attention(module: str) -> Attend:
    """FlashAttention's own package, version 4 (flash_attn.cute) or 3 (flash_attn_interface): the calls used here are
    the same."""
    call = import_module(module).flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int,
               scale: float | None, window: int | None) -> Tensor:
        options: dict[str, Any] = {"cu_seqlens_q": q_starts, "cu_seqlens_k": k_starts, "softmax_scale": scale,
                                   "causal": True}
        if "max_seqlen_q" in inspect.signature(call).parameters:
            options |= {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        out = call(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _torch(repeated: bool) -> Attend:
    """torch.nn.attention.varlen, FlashAttention 2 in torch. It takes fewer key heads than query heads, in some releases
    only if told so; where one refuses, the keys are repeated to all heads, which costs memory and time."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        raise ImportError("it has no causal mask that is aligned at the lower right before torch 2.11")

    def attend(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int,
               scale: float | None, window: int | None) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
        if repeated:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        elif "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        out: Any = varlen_attn(q, k, v, q_starts, k_starts, max_q, max_k, **options)
        return out

    return attend


CANDIDATES: dict[str, Callable[[], Attend]] = {                           # the fastest first
    "FlashAttention 4": partial(_flash_attention, "flash_attn.cute"),
    "FlashAttention 3": partial(_flash_attention, "flash_attn_interface"),
    "torch's FlashAttention 2": partial(_torch, False),
    "torch's FlashAttention 2 over repeated keys": partial(_torch, True),
}
