"""Whatever backward recomputes, gradients are bit for bit those of keeping everything, and less is kept."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.models import checkpointing
from dpo_dist.models.attention import Forest
from dpo_dist.models.checkpointing import checkpoint_layers, decoder_layers
from dpo_dist.models.load import _without_dropout
from dpo_dist.models.lora import add_lora
from dpo_dist.models.tiny import shrink

CONFIGS = [LlamaConfig, Qwen2Config, Qwen3Config, Gemma2Config, GPT2Config, MixtralConfig]
HOWS: list[bool | int] = [True, 0, 1, 2]
PACK = pack_sequences([Sequences(tuple(range(3, 13)), (tuple(range(13, 21)), tuple(range(21, 27)))),
                       Sequences((5, 6, 7), ((8, 9),))])


def small(kind: Any, attention: str = "branch") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(kind(num_hidden_layers=2)), attn_implementation=attention,
                                             dtype=torch.float32).train()
    _without_dropout(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def forward(model: Any, packed: bool = True) -> Tensor:
    if not packed:
        return model.base_model(input_ids=PACK.input_ids[0, :24].reshape(2, 12), use_cache=False).last_hidden_state
    return model.base_model(input_ids=PACK.input_ids, position_ids=PACK.position_ids, use_cache=False,
                            forest=Forest(PACK.trees)).last_hidden_state


def gradients(model: Any, packed: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    states = forward(model, packed)
    upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
    (states * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kept_storages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that fills with what torch keeps for each selectively recomputed layer."""
    storages = []

    def contexts(policy: Any) -> Any:
        both = create_selective_checkpoint_contexts(policy)
        storages.append(both[0].storage)
        return both

    monkeypatch.setattr(checkpointing, "create_selective_checkpoint_contexts", contexts)
    return storages


def kept_tensors(storages: list[Any]) -> list[Tensor]:
    calls = [call for storage in storages for of_operator in storage.values()
             for call in (of_operator.values() if isinstance(of_operator, dict) else of_operator)]
    outputs = [getattr(output, "val", None) for call in calls
               for output in (call if isinstance(call, tuple | list) else [call])]
    return [output for output in outputs if isinstance(output, Tensor)]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.model_type)
def test_recomputing_changes_no_bit_of_the_gradients(kind: Any, how: bool | int):
    model = small(kind)
    kept = gradients(model)
    checkpoint_layers(model, how)
    assert equal(gradients(model), kept)


def test_routers_of_experts_draw_no_noise_that_recomputing_would_draw_anew():
    config = shrink(MixtralConfig(router_jitter_noise=0.3, num_hidden_layers=2))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="branch", dtype=torch.float32).train()
    assert not torch.equal(forward(model), forward(model))
    _without_dropout(model)
    kept = gradients(model)
    checkpoint_layers(model, True)
    assert equal(gradients(model), kept)


@pytest.mark.parametrize("how", HOWS)
def test_padded_rows_are_recomputed_as_well(how: bool | int):
    model = small(LlamaConfig, "sdpa")
    kept = gradients(model, packed=False)
    checkpoint_layers(model, how)
    assert equal(gradients(model, packed=False), kept)


@pytest.mark.parametrize("how", HOWS)
def test_adapters_are_trained_the_same_over_recomputed_layers(how: bool | int):
    def adapted(how: bool | int) -> Any:
        out = add_lora(small(Qwen2Config), LoraConfig(3, None, "all-linear"), 0)
        checkpoint_layers(out, how)
        for name, parameter in out.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter)
        return out.train()

    kept, model = gradients(adapted(False).get_base_model()), adapted(how).get_base_model()
    assert len(kept) == 28 and all(g.any() for g in kept.values())
    assert equal(gradients(model), kept)


def test_evaluating_without_gradients_gives_the_same_states():
    model = small(LlamaConfig)
    wanted = forward(model).detach()
    checkpoint_layers(model, 1)
    with torch.no_grad():
        assert torch.equal(forward(model), wanted)
        assert torch.equal(forward(model.eval()), wanted)


def test_no_product_and_no_attention_is_computed_twice_beside_the_cheap_parts():
    def flops(how: bool | int) -> int:
        model = small(LlamaConfig)
        checkpoint_layers(model, how)
        with FlopCounterMode(display=False) as counter:
            gradients(model)
        return counter.get_total_flops()

    assert flops(0) == flops(False) < flops(1) < flops(True)


def test_of_adapters_the_narrow_products_are_kept_and_the_wide_ones_computed_again(monkeypatch: pytest.MonkeyPatch):
    model = add_lora(small(LlamaConfig), LoraConfig(3, None, "all-linear"), 0).train()
    storages = kept_storages(monkeypatch)
    checkpoint_layers(model, 0)
    forward(model.get_base_model())
    products = [t.shape[-1] for t in kept_tensors(storages[:1]) if t.ndim == 2]
    assert sorted(products) == [3] * 7 + [32] * 5 + [48] * 2, "of a layer's seven base layers and As, but of no B"


def test_a_layer_that_changes_a_kept_product_in_place_is_refused_and_not_silently_wrong():
    model = small(LlamaConfig)
    down = decoder_layers(model)[1].self_attn.o_proj
    down.register_forward_hook(lambda module, inputs, output: output.add_(1.0))
    checkpoint_layers(model, 0)
    with pytest.raises(UserError, match="changes one in place"):
        gradients(model)


def test_more_layers_than_there_are_and_layers_that_cannot_be_recomputed_are_refused():
    with pytest.raises(UserError, match="=3, but the model has 2 layers"):
        checkpoint_layers(small(LlamaConfig), 3)
    with pytest.raises(UserError, match="the layers of this model cannot be recomputed"):
        checkpoint_layers(nn.Sequential(nn.Linear(2, 2)), True)
