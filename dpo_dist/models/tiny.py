"""A tiny random model of an architecture, on which is tried what a large one will do."""
from __future__ import annotations

import copy
from contextlib import suppress
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig

from dpo_dist.models.sharded import apart_from_sharding
from dpo_dist.models.text import backbone, empty_lm, setting, text_config

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, INNER = 32, 4, 2, 8, 48
EXPERTS, VISITED_EXPERTS = 16, 4
NEAR = 6                                   # tokens: whatever looks only so far must show in a row of two dozen
MOST_ELEMENTS = 100_000_000
# What configs call the sizes that grow with a model: multiplied by `scale`.
_SCALED = {
    HIDDEN: ("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_dim", "embedding_size", "word_embed_proj_dim",
             "lru_width", "mamba_d_ssm", "moe_hidden_size", "ple_embed_dim"),
    HEADS: ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
            "swa_num_attention_heads", "num_sliding_attention_heads", "linear_num_heads", "linear_num_key_heads",
            "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    KEY_HEADS: ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"),
    INNER: ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "dim_ff", "dff",
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
            "shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size", "share_expert_dim", "router_hidden_size"),
}
_FIXED = {
    HEAD_DIM: ("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "linear_head_dim",
               "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim",
               "kv_channels", "dim_head", "index_head_dim", "query_pre_attn_scalar", "hidden_size_per_layer_input",
               "d_rel"),
    2 * HEAD_DIM: ("qk_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "mamba_d_state", "ssm_state_size",
                   "state_size", "time_step_rank", "mamba_dt_rank", "attention_head_dim", "adapter_rank",
                   "laurel_rank", "gated_norm_rank", "hc_lowrank"),
    HEADS: ("rotary_dim",),
    # scores of an indexer are 0 where no head of it agrees; equal scores are cut anywhere, which more heads prevent
    32: ("index_n_heads",),
    NEAR: ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size",
           "local_attention", "index_topk", "keep_window_size", "rel_extent"),
    64: ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    2: ("index_kpool",),
    1: ("mamba_expand", "expand"),
}
_AT_MOST = {
    EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"),
    VISITED_EXPERTS: ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    2: ("n_groups", "mamba_n_groups", "mamba_ngroups", "o_groups"),
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrink(config: PretrainedConfig, scale: int = 1) -> PretrainedConfig:
    """The same architecture with its number of layers, and 4 · scale heads of 8 (or 2 · scale key-value heads)."""
    small = copy.deepcopy(text_config(config))
    each_has_its_own = setting(small, "num_attention_heads") == setting(small, "num_key_value_heads")
    hidden = setting(small, "hidden_size") or 0
    head_dim = setting(small, "head_dim") or hidden // (setting(small, "num_attention_heads") or 1)
    wide = (setting(small, "attention_hidden_size") or 0) // max(1, hidden)
    wanted = {key: size * scale for size, keys in _SCALED.items() for key in keys}
    wanted |= {key: size for size, keys in _FIXED.items() for key in keys} | _ENDS
    for key, size in wanted.items():
        _set(small, key, size)
    for size, keys in _AT_MOST.items():
        for key in keys:
            _set(small, key, size, only_down=True)
    if each_has_its_own and setting(small, "num_key_value_heads"):
        small.num_key_value_heads = small.num_attention_heads
    _set(small, "attention_hidden_size", wide * HIDDEN * scale)
    _shrink_sections(small, head_dim)
    return small


def _shrink_sections(config: Any, head_dim: int) -> None:
    """Text positions are the same in all three dimensions of a multimodal rotary embedding, so that any split of a head
    among them will do."""
    rope = setting(config, "rope_parameters") or {}
    if sections := rope.get("mrope_section"):
        half, parts = sum(sections) * HEAD_DIM // head_dim, len(sections)
        rope["mrope_section"] = [half - (parts - 1) * (half // parts), *[half // parts] * (parts - 1)]


def _set(config: Any, key: str, size: int, only_down: bool = False) -> None:
    """Sets a size that the config uses, also where it is a list of sizes, one a layer."""
    value = setting(config, key)
    if not value or isinstance(value, bool):           # a part of no size is not there
        return
    many = isinstance(value, (list, tuple))
    new = [min(v, size) if only_down else size for v in (value if many else [value])]
    with suppress(AttributeError):         # a size that follows from others
        setattr(config, key, new if many else new[0])


def tiny_backbone(config: PretrainedConfig, attention: str, scale: int = 1) -> Any:
    """The layers of shrink(config, scale) up to the last kind that it has, with embeddings and without a head, in fp32
    and in evaluation mode; the same random weights at every call. ValueError where the architecture has sizes that
    shrink() does not know."""
    small, model_class = shrink(config, scale), backbone_class(config)
    with apart_from_sharding(), torch.device("meta"):
        elements = sum(p.numel() for p in model_class._from_config(copy.deepcopy(small)).parameters())
    if elements > MOST_ELEMENTS:
        raise ValueError(f"its sizes cannot be shrunk (a tiny model would have {elements:,} parameters)")
    with apart_from_sharding(), torch.random.fork_rng(devices=[]), torch.no_grad():
        model = model_class._from_config(small, attn_implementation=attention, dtype=torch.float32).eval()
        keep_a_layer_of_each_kind(model)
        torch.manual_seed(0)
        for parameter in model.parameters():
            shake(parameter)
    return model


def backbone_class(config: PretrainedConfig) -> Any:
    """The class of a model's backbone."""
    if type(text_config(config)) in MODEL_MAPPING:
        return MODEL_MAPPING[type(text_config(config))]
    return type(backbone(empty_lm(config)))


def shake(parameter: Tensor) -> None:
    """Random weights through which tokens are felt: matrices keep the size of what they are given, and others (norms,
    decays, biases) stay near what the architecture starts with."""
    if parameter.ndim > 1:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    else:
        parameter.add_(0.2 * torch.randn_like(parameter))


def keep_a_layer_of_each_kind(model: nn.Module) -> None:
    """Drops the last layers of a backbone as long as others of their kind stand before them.

    Deep random models amplify rounding; and which layers are special stands in no one key of configs (lists, periods,
    patterns), so the layers themselves are compared.
    """
    number = getattr(model.config, "num_hidden_layers", None)
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == number:
            kinds = [_kind(layer) for layer in stack]
            needed = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
            if needed < number:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, stack[:needed])
            return


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What tells layers apart: their modules' classes and shapes, and the switches and sizes that these hold."""
    return tuple((name, type(module).__name__,
                  tuple(sorted((key, repr(value)) for key, value in vars(module).items()
                               if isinstance(value, (bool, str, NoneType))
                               or (isinstance(value, int) and not ("layer" in key or "idx" in key)))),
                  tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)))
                 for name, module in layer.named_modules())
