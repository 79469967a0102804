"""FLOPs are counted, not guessed: torch's own counter over a real forward is the oracle."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from dpo_dist.models.cost import forward_flops
from dpo_dist.sizing.flops import Flops

T = 48
SHAPE = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 96}


@pytest.mark.parametrize("config", [
    LlamaConfig(**SHAPE), LlamaConfig(**SHAPE, tie_word_embeddings=True), Qwen3Config(**SHAPE, head_dim=16),
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96),
    MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)],
                         ids=["llama", "llama, tied", "qwen3", "gpt2", "mixtral"])
def test_a_models_flops_are_those_that_torch_counts(config: AutoConfig):
    # its grouped products go uncounted by torch
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(T)[None], use_cache=False)
    flops = forward_flops(config)
    # eager computes the masked half as well
    whole_square = sum(per_key for per_key, _ in flops.attention) * T * T
    rope = 2 * T * 8 if "Llama" in type(config).__name__ or "Mixtral" in type(config).__name__ else 2 * T * 16
    expected = (flops.per_token + flops.per_completion_token) * T + whole_square
    assert counter.get_total_flops() == pytest.approx(expected, abs=rope)


def test_a_sliding_window_bounds_the_keys_that_count():
    flops = forward_flops(MistralConfig(**SHAPE, sliding_window=8))
    assert [window for _, window in flops.attention] == [8]
    (per_key, _), = flops.attention
    seen = sum(min(i + 1, 8) for i in range(10, 30))
    assert flops.of_tokens(np.array([10]), np.array([30]))[0] == 20 * flops.per_token + per_key * seen


def test_a_pair_is_its_prompt_once_and_each_completion_after_it():
    flops = Flops(10.0, 5.0, ((1.0, None),))
    prompts, completions = flops.of_pairs(np.array([[3, 2, 1]]))
    assert prompts.tolist() == [3 * 10 + 1 + 2 + 3]
    assert completions.tolist() == [[2 * 15 + 4 + 5, 15 + 4]]


def test_training_costs_three_forwards_and_two_where_the_base_is_frozen():
    assert Flops(10.0, 5.0, ((1.0, 4),)).training(False) == Flops(30.0, 15.0, ((3.0, 4),))
    assert Flops(10.0, 5.0, ((1.0, 4),)).training(True) == Flops(20.0, 10.0, ((3.0, 4),))
