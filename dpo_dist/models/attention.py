"""Branch attention: each prompt of a pack sees itself, each completion sees its prompt and itself, and nothing else.

No mask over the pack exists; the cost grows with the branches, not with the square of the pack. It is registered under
the name "branch" in transformers' table of attention functions and receives the pack's structure as the keyword
`forest`. On a GPU in low precision it is one call of a variable-length kernel (varlen.py); elsewhere one
scaled_dot_product_attention a branch.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.models.text import setting, text_config
from dpo_dist.models.varlen import Attend, choose_kernel, visible_keys
from dpo_dist.types import Tree


class Forest:
    """A pack's trees, and what all layers share of them (made once a pack)."""

    def __init__(self, trees: Sequence[Tree]):
        self.lengths = [span.end - span.start for tree in trees for span in (tree.prompt, *tree.branches)]
        # for each prompt and branch: which of the `lengths` it sees, its prompt's and its own
        self._sees: list[list[int]] = []
        for tree in trees:
            prompt = len(self._sees)
            self._sees += [[prompt], *([prompt, prompt + i] for i in range(1, len(tree.branches) + 1))]
        self.mask = cache(visible_keys)          # one for all layers
        self._starts: dict[torch.device, Tensor] = {}

    def keys_of_each(self, key: Tensor, dim: int) -> list[list[Tensor]]:
        """For each prompt and branch, in the pack's order, the pieces of `key` that it sees.

        Cut by one split: its backward is one concatenation, where each slice's own would fill a tensor of the whole
        pack.
        """
        pieces = key.split(self.lengths, dim)
        return [[pieces[i] for i in seen] for seen in self._sees]

    @cached_property
    def seen(self) -> list[int]:
        """How many keys each prompt and branch sees, its own included."""
        return [sum(self.lengths[i] for i in seen) for seen in self._sees]

    def starts(self, device: torch.device) -> Tensor:
        """(2, prompts and branches + 1) int32: where the queries and the keys of each begin, and the last end."""
        if device not in self._starts:
            starts = torch.tensor([[0, *accumulate(self.lengths)], [0, *accumulate(self.seen)]], dtype=torch.int32)
            if device.type == "cuda":
                starts = starts.pin_memory()
            self._starts[device] = starts.to(device, non_blocking=device.type == "cuda")
        return self._starts[device]


def branch_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, forest: Forest | None = None,
                     sliding_window: int | None = None, softcap: float | None = None, **_: Any) -> tuple[Tensor, None]:
    """(1, T, H, D) attention of a pack. query (1, H, T, D); key, value (1, Hkv, T, D). No forest: plain causal rows."""
    if forest is None:
        rows = _attend(Forest(()), query, key, value, scaling, sliding_window, softcap)
        return rows.transpose(1, 2).contiguous(), None
    if query.is_cuda and softcap is None:
        kernel = choose_kernel(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3]).kernel
        if kernel is not None:
            return packed_attention(query, key, value, forest, scaling, sliding_window, kernel.attend), None
    parts = zip(query.split(forest.lengths, 2), forest.keys_of_each(key, 2), forest.keys_of_each(value, 2), strict=True)
    out = [_attend(forest, q, torch.cat(k, 2), torch.cat(v, 2), scaling, sliding_window, softcap) for q, k, v in parts]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def describe_attention(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """How branch attention will be computed on this GPU, and why not faster; None on a CPU, where there is one way."""
    if device.type != "cuda":
        return None
    config = text_config(config)
    if setting(config, "attn_logit_softcapping") is not None:
        return "one masked call for each prompt and branch, which is slow (the model bounds its scores by a soft cap)"
    heads = setting(config, "num_attention_heads") or 1
    head_dim = setting(config, "head_dim") or config.hidden_size // heads
    return str(choose_kernel(device, dtype, heads, setting(config, "num_key_value_heads") or heads, head_dim))


def packed_attention(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float | None,
                     window: int | None, attend: Attend) -> Tensor:
    """(1, T, H, D), as branch_attention: one call in which each prompt and branch is a sequence, its prompt's keys
    before its own.

    A prompt's keys are copied once a branch, in the key heads that the model has: about 0.5 % of a layer's time, and
    simpler than two calls (branches against themselves, and against their prompts) whose joining moves as many bytes.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                       # (T, H, D)
    keys, values = (torch.cat([piece for pieces in forest.keys_of_each(x, 0) for piece in pieces]) for x in (k, v))
    of_queries, of_keys = forest.starts(q.device)
    return attend(q.contiguous(), keys, values, of_queries, of_keys, max(forest.lengths), max(forest.seen), scaling,
                  window)[None]


def _attend(forest: Forest, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
            softcap: float | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    window = window if window is not None and window < keys else None
    if softcap is not None:
        return _softcapped(q, k, v, scaling, forest.mask(queries, keys, window, q.device), softcap)
    grouped = q.shape[1] != k.shape[1]
    if queries == keys and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = forest.mask(queries, keys, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, mask: Tensor, softcap: float) -> Tensor:
    """Gemma 2 (arXiv 2408.00118, section 2): scores are softcap * tanh(scores / softcap) before the softmax."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32 if scores.dtype != torch.float64 else None).to(q.dtype) @ v


ALL_ATTENTION_FUNCTIONS.register("branch", branch_attention)
