"""A model's Flops, from its config alone: on torch's meta device weights have shapes and no bytes."""
from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from dpo_dist.models.text import backbone, empty_lm, output_head, setting, text_config
from dpo_dist.sizing.flops import Flops


def forward_flops(config: PretrainedConfig) -> Flops:
    """Flops of the language model that `config` describes. Of experts, only those that a token visits count."""
    model = empty_lm(config)
    text, head = text_config(config), output_head(model).weight
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in backbone(model).parameters() if p.ndim >= 2 and id(p) not in embeddings | {id(head)}]
    per_token = sum(2.0 * p.numel() * (_visited(text) if p.ndim == 3 else 1.0) for p in weights)
    return Flops(per_token, 2.0 * head.numel(), _attention(text))


def _visited(config: Any) -> float:
    """The share of the experts that a token visits; their weights are stacked in one parameter of three dimensions."""
    experts = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts")
                    if (n := getattr(config, key, None))), 1)
    return float((getattr(config, "num_experts_per_tok", None) or experts) / experts)


def _attention(config: Any) -> tuple[tuple[float, int | None], ...]:
    """Of each kind of layer that attends; layers with a state or a convolution cost nothing for each pair of tokens."""
    heads, layers = (setting(config, key) or 0 for key in ("num_attention_heads", "num_hidden_layers"))
    if not heads:
        return ()
    width = heads * (setting(config, "head_dim") or config.hidden_size // heads)
    window = setting(config, "sliding_window")
    kinds = setting(config, "layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    counts = Counter(window if kind == "sliding_attention" else None for kind in kinds
                     if kind not in WITHOUT_ATTENTION)
    # q k^T, and the probabilities' product with v
    return tuple((4.0 * width * n, window) for window, n in counts.items())


WITHOUT_ATTENTION = ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp")


def layer_elements(layers: nn.ModuleList) -> int:
    """Parameters of the largest of a model's decoder layers, also where ZeRO-3 has sharded them."""
    return max(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in layers)
