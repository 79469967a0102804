"""A model's shape, counted from config.json, is held against the real model: its parameters, its FLOPs, and what
autograd saves."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kernels import PLAIN
from test_checkpointing import kept_storages, kept_tensors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from dpo_dist.config.errors import UserError
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.models.attention import Forest
from dpo_dist.models.checkpointing import checkpoint_layers
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.fused import fuse
from dpo_dist.sizing.shape import ModelShape, model_shape, read_shape

REPO = Path(__file__).resolve().parents[2]
PROMPT, COMPLETION = 64, 32
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "vocab_size": 96, "num_hidden_layers": 4, "pad_token_id": 0,
                         "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE), "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE), "qwen2, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2, window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32), "qwen3, tied": Qwen3Config(**SHAPE, head_dim=32,
                                                                           tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=4096), "mistral, no window": MistralConfig(**SHAPE,
                                                                                                sliding_window=None),
    "gemma2": Gemma2Config(**SHAPE, head_dim=32, sliding_window=4096),
    "gemma3_text": Gemma3TextConfig(**SHAPE, head_dim=32, sliding_window=4096),
    "olmo3": Olmo3Config(**SHAPE, sliding_window=4096), "olmo3, tied": Olmo3Config(**SHAPE, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SHAPE), "smollm3, untied": SmolLM3Config(**SHAPE, tie_word_embeddings=False),
    "gpt2": GPT2Config(n_embd=64, n_head=4, n_layer=4, n_inner=160, vocab_size=96, n_positions=128, bos_token_id=1,
                       eos_token_id=2),
    "gpt2, untied": GPT2Config(n_embd=64, n_head=4, n_layer=4, vocab_size=96, n_positions=128, bos_token_id=1,
                               eos_token_id=2, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
SIMPLE = {name: config for name, config in CONFIGS.items() if "," not in name and name != "mixtral"}


def shape_of(config: Any, folder: Path) -> ModelShape:
    config.save_pretrained(folder)
    return read_shape(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_model(name: str, tmp_path: Path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    shape = shape_of(CONFIGS[name], tmp_path)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.largest == max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_training_counts_with(name: str, tmp_path: Path):
    mine, theirs = shape_of(CONFIGS[name], tmp_path).flops, forward_flops(CONFIGS[name])
    assert (mine.per_token, mine.per_completion_token) == (theirs.per_token, theirs.per_completion_token)
    assert sorted(mine.attention, key=str) == sorted(theirs.attention, key=str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["eager", "fused", "recompute", "fused, recompute"])
@pytest.mark.parametrize("name", [*SIMPLE, "mixtral"])
def test_saved_activations_are_those_that_autograd_keeps(name: str, how: str, dtype: torch.dtype, tmp_path: Path):
    # two prompts, each with two completions; keys: the prompt's own, and the prompt's again before each completion
    tokens = PROMPT + 2 * COMPLETION
    keys, masks = PROMPT + 2 * (PROMPT + COMPLETION), 2 * COMPLETION * (PROMPT + COMPLETION)
    shape = shape_of(CONFIGS[name], tmp_path)
    scores = masks if not shape.family.eager else masks + PROMPT**2
    fused, recompute = "fused" in how, "recompute" in how
    expected = shape.saved_bytes_per_token(dtype.itemsize, keys / tokens, scores / tokens, 2, fused, recompute)
    assert expected == pytest.approx(_saved_per_layer_and_token(CONFIGS[name], dtype, fused, recompute), rel=0.03)


def _saved_per_layer_and_token(config: Any, dtype: torch.dtype, fused: bool, recompute: bool) -> float:
    """The difference that two layers make to the bytes that autograd, and what recomputes, keep."""
    prompt, completion = tuple(range(3, 3 + PROMPT)), tuple(range(3, 3 + COMPLETION))
    batch = pack_sequences([Sequences(prompt, (completion, completion))] * 2)
    totals = []
    for layers in (2, 4):
        small = copy.deepcopy(config)
        small.num_hidden_layers = layers
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:layers]
        model = AutoModelForCausalLM.from_config(small, attn_implementation="branch", dtype=dtype).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if fused:
            fuse(model, PLAIN)
        if recompute:
            checkpoint_layers(model, 0)
        kept: dict[int, torch.Tensor] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep,
                                                                                             lambda tensor: tensor):
            storages = kept_storages(patch)
            model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                             forest=Forest(batch.trees))
        for tensor in kept_tensors(storages):
            keep(tensor)
        totals.append(sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights))
    return (totals[1] - totals[0]) / 2 / batch.input_ids.numel()


def test_lora_adapters_are_counted_as_peft_makes_them(tmp_path: Path):
    import peft

    model = peft.get_peft_model(AutoModelForCausalLM.from_config(CONFIGS["llama"]),
                                peft.LoraConfig(r=8, target_modules="all-linear"))
    assert shape_of(CONFIGS["llama"],
                    tmp_path).lora_parameters(8) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "parameters"),
                         [("llama-3.1-70b", 70_553_706_496), ("llama-3.1-405b", 405_853_388_800)])
def test_the_published_shapes_have_their_published_sizes(name: str, parameters: int):
    assert read_shape(REPO / "docs" / "shapes" / name).parameters == parameters


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(UserError, match="model_type=mamba"):
        model_shape({"model_type": "mamba", "vocab_size": 10})
