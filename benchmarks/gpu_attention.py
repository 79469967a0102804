"""Other ways to compute branch attention than the project's own, with its signature, so that a model may run on any of them.

sdpa: one scaled_dot_product_attention a prompt or branch, told of its mask by torch's causal_lower_right, so that flash kernels take it.
flex: one flex_attention over the pack, with a block mask; on a GPU both are compiled, once for all lengths. No backward on a CPU.
"""
from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.models.attention import Forest, branch_attention


def sdpa_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
                   forest: Forest | None = None, **_: Any) -> tuple[Tensor, None]:
    assert forest is not None
    out = []
    for q, k, v in zip(query.split(forest.lengths, 2), forest.keys_of_each(key, 2), forest.keys_of_each(value, 2), strict=True):
        keys, values = torch.cat(k, 2), torch.cat(v, 2)
        mask: Any = causal_lower_right(q.shape[2], keys.shape[2])
        out.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != keys.shape[1]))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def flex_branch_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
                          forest: Forest | None = None, **_: Any) -> tuple[Tensor, None]:
    assert forest is not None
    out = compiled(flex_attention, query.is_cuda)(query, key, value, block_mask=_block_mask(forest, query.device), scale=scaling,
                                                  enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


_BLOCK_MASKS: WeakKeyDictionary[Forest, BlockMask] = WeakKeyDictionary()       # all layers of a forward share one


def _block_mask(forest: Forest, device: torch.device) -> BlockMask:
    """A token sees what stands before it in its own span, and in the prompt of its tree."""
    if forest not in _BLOCK_MASKS:
        lengths, span, prompt = torch.tensor(forest.lengths), [], []
        for branches in forest.branches:
            prompt += [len(prompt)] * (1 + branches)
        span = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        root = torch.tensor(prompt).repeat_interleave(lengths).to(device)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((span[k] == span[q]) | (span[k] == root[q]))

        tokens = int(lengths.sum())
        _BLOCK_MASKS[forest] = compiled(create_block_mask, device.type == "cuda")(visible, None, None, tokens, tokens, device=device)
    return _BLOCK_MASKS[forest]


@cache
def compiled(function: Any, on_gpu: bool) -> Any:
    return torch.compile(function, dynamic=True) if on_gpu else function


CANDIDATES = {"branch": branch_attention, "sdpa": sdpa_attention, "flex": flex_branch_attention}
ALL_ATTENTION_FUNCTIONS.register("candidate_sdpa", sdpa_attention)
ALL_ATTENTION_FUNCTIONS.register("candidate_flex", flex_branch_attention)
IMPLEMENTATIONS = {"branch": "branch", "sdpa": "candidate_sdpa", "flex": "candidate_flex"}
