"""A model's Flops, from its config alone: on torch's meta device weights have shapes and no bytes."""
from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dpo_dist.sizing.flops import Flops


def forward_flops(config: PretrainedConfig) -> Flops:
    """Flops of the architecture that `config` describes. Of experts, only those that a token visits count."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings().weight
    weights = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings | {id(head)}]
    per_token = sum(2.0 * p.numel() * (_visited(config) if p.ndim == 3 else 1.0) for p in weights)
    return Flops(per_token, 2.0 * head.numel(), _attention(config))


def _visited(config: Any) -> float:
    """The share of the experts that a token visits; their weights are stacked in one parameter of three dimensions."""
    experts = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts")
                    if (n := getattr(config, key, None))), 1)
    return float((getattr(config, "num_experts_per_tok", None) or experts) / experts)


def _attention(config: Any) -> tuple[tuple[float, int | None], ...]:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    counts = Counter(window if kind == "sliding_attention" else None for kind in kinds)
    # q k^T, and the probabilities' product with v
    return tuple((4.0 * width * n, window) for window, n in counts.items())


def layer_elements(model: nn.Module, layers: int) -> int:
    """Parameters of the largest decoder layer of a model that has so many, also where ZeRO-3 has sharded them."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return max(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in stacks[0])
