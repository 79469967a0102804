"""Branch attention: each prompt of a pack sees itself, each completion sees its prompt and itself, and nothing else.

No mask over the pack exists; the cost grows with the branches, not with the square of the pack. It is registered under
the name "branch" in transformers' table of attention functions and receives the pack's structure as the keyword
`forest`. On a GPU in low precision it is one call of a variable-length kernel (varlen.py); elsewhere one
scaled_dot_product_attention a branch.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.models.trial import first_line
from dpo_dist.models.varlen import Attend, choose_kernel, visible_keys
from dpo_dist.types import Span, Tree


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
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "one masked call for each prompt and branch, which is slow (the model bounds its scores by a soft cap)"
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return str(choose_kernel(device, dtype, heads, getattr(config, "num_key_value_heads", None) or heads, head_dim))


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


# ----------------------------------------------------------------------------------- which models branch attention fits

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
          "vocab_size": 64, "n_embd": 32, "n_head": 4, "n_inner": 48, "sliding_window": 6, "query_pre_attn_scalar": 8,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WITH_HEADS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "n_embd", "n_head",
               "n_inner")


def branch_misfit(config: PretrainedConfig) -> str | None:
    """None where branch attention is exact for this architecture, else why not.

    Found by trying: a tiny random model of the same architecture computes two branches packed, and a copy with the
    architecture's own attention computes each row alone. Features that ours lacks (sinks, chunks) show here.
    """
    try:
        error = _packed_error(tiny_model(config, "branch"), tiny_model(config, "eager"))
    except Exception as problem:         # an unknown architecture may fail in any way
        return first_line(problem)
    return None if error < 1e-3 else f"packed and unpacked hidden states differ by {error:.2g}"


def tiny_model(config: PretrainedConfig, attention: str, scale: int = 1) -> Any:
    """A model of shrink(config, scale) in fp32, in evaluation mode, with the same random weights at every call."""
    with torch.random.fork_rng(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(shrink(config, scale), attn_implementation=attention,
                                                 dtype=torch.float32).eval()
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def shrink(config: PretrainedConfig, scale: int = 1) -> PretrainedConfig:
    """The same architecture with 4 · scale heads of 8 (or 2 · scale key-value heads), a layer of each kind."""
    small = copy.deepcopy(config)
    wider = {key: scale * _SMALL[key] for key in _WITH_HEADS}
    for key, value in {**_SMALL, **wider}.items():
        if getattr(small, key, None) is not None:
            setattr(small, key, value)
    if getattr(small, "num_key_value_heads", None) and config.num_key_value_heads == config.num_attention_heads:
        small.num_key_value_heads = small.num_attention_heads
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    layers = max(2, len(kinds))
    if kinds:
        small.layer_types = (kinds * 2)[:layers]
    for key in ("num_hidden_layers", "n_layer"):
        if hasattr(small, key):
            setattr(small, key, layers)
    return small


@torch.no_grad()
def _packed_error(model: Any, twin: Any) -> float:
    """The largest difference between the hidden states of a pack by `model` and of its rows by `twin`, over their
    largest."""
    ids = torch.arange(3, 27)
    prompt, left, right = ids[:10], ids[10:18], ids[18:]
    tree = Tree(Span(0, 10), (Span(10, 18), Span(18, 24)))
    positions = torch.tensor([*range(10), *range(10, 18), *range(10, 16)])
    packed = model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False,
                              forest=Forest([tree])).last_hidden_state[0]
    rows = [twin.base_model(input_ids=torch.cat([prompt, c])[None], use_cache=False).last_hidden_state[0]
            for c in (left, right)]
    wanted = torch.cat([rows[0], rows[1][10:]])
    return ((packed - wanted).abs().max() / wanted.abs().max()).item()
