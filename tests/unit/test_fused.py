"""Fused norms, SwiGLU and rotary embedding: the model's own numbers, whatever recomputes, adapts or packs."""
from __future__ import annotations

import copy
from typing import Any

import interpreter
import plain_kernels
import pytest
import torch
from plain_kernels import PLAIN
from test_checkpointing import equal, forward, gradients, small
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig
from dpo_dist.models.checkpointing import checkpoint_layers
from dpo_dist.models.fused import (
    NORM,
    ROTARY,
    SWIGLU,
    Kernels,
    Norm,
    Rotary,
    SwiGLU,
    choose_kernels,
    fuse,
    fused_misfit,
)
from dpo_dist.models.lora import add_lora

ALL = {NORM, SWIGLU, ROTARY}
KINDS = {LlamaConfig: ALL, Qwen2Config: ALL, Qwen3Config: ALL, MistralConfig: ALL, Olmo2Config: ALL,
         MixtralConfig: {NORM, ROTARY},            # its experts are stacked
         Gemma2Config: {ROTARY},                   # norms by 1 + weight, GELU
         Phi3Config: {NORM, ROTARY},               # gate and up are one product
         CohereConfig: {SWIGLU},                   # rotates neighbours, not halves
         StableLmConfig: {SWIGLU, ROTARY},         # LayerNorm
         GPT2Config: set()}
CPU = torch.device("cpu")


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """The same gradients; transformers' norms round to fp32 within fp64, and a gradient of 0 has no digits of its
    own."""
    scale = max(g.norm() for g in wanted.values())
    return got.keys() == wanted.keys() and all((got[n] - g).norm() < 2e-6 * (g.norm() + 1e-2 * scale)
                                               for n, g in wanted.items())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_what_computes_as_llama_does_is_replaced_and_nothing_else(kind: Any):
    assert set(fuse(small(kind), PLAIN)) == KINDS[kind]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (GPT2Config, MixtralConfig)],
                         ids=lambda kind: kind.model_type)
def test_hidden_states_and_gradients_are_the_models_own_in_fp64(kind: Any):
    own = small(kind).double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.2)
    fused = copy.deepcopy(own)
    fuse(fused, PLAIN)
    wanted, got = gradients(own), gradients(fused)
    assert close(got, wanted)
    assert torch.allclose(forward(fused), forward(own), atol=1e-5)


def test_autograd_agrees_with_finite_differences():
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(lambda x, w: Norm.apply(x, w, 1e-6, PLAIN), (numbers(2, 3, 4), numbers(4)))
    assert torch.autograd.gradcheck(lambda g, u: SwiGLU.apply(g, u, PLAIN), (numbers(2, 5), numbers(2, 5)))
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Rotary.apply(x, cos, sin, PLAIN), (numbers(2, 2, 3, 4),))


@pytest.mark.parametrize("how", [True, 0, 1])
def test_recomputing_changes_no_bit_of_fused_layers_either(how: bool | int):
    model = small(Qwen3Config)
    fuse(model, PLAIN)
    kept = gradients(model)
    checkpoint_layers(model, how)
    assert equal(gradients(model), kept)


def test_adapters_train_over_fused_layers_as_over_the_models_own():
    def adapted(fused: bool) -> dict[str, Tensor]:
        model = small(Qwen2Config)
        if fused:
            assert set(fuse(model, PLAIN)) == ALL
        out = add_lora(model, LoraConfig(3, None, "all-linear"), 0)
        for name, parameter in out.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return gradients(out.double().train().get_base_model())

    own, fused = adapted(False), adapted(True)
    assert len(own) == 28
    assert close(fused, own)


def test_names_and_weights_stay_and_other_models_of_the_class_are_not_touched():
    model, other = small(LlamaConfig), small(LlamaConfig)
    names, before = list(model.state_dict()), gradients(other)
    calls = []

    def rotate(*args: Any) -> Tensor:
        calls.append(args)
        return plain_kernels.rotate(*args)

    fuse(model, Kernels(PLAIN.norm, PLAIN.norm_backward, PLAIN.swiglu, PLAIN.swiglu_backward, rotate))
    assert list(model.state_dict()) == names
    assert equal(gradients(other), before) and not calls
    forward(model)
    assert len(calls) == 4                         # queries and keys of two layers


def test_a_weight_that_is_exchanged_after_fusing_is_the_one_that_counts():
    model = small(LlamaConfig)
    fuse(model, PLAIN)
    norm = model.model.norm
    with torch.no_grad():
        norm.weight.data = torch.zeros_like(norm.weight)          # as ZeRO-3 exchanges the data behind a parameter
    assert not forward(model).any()


def test_the_probe_passes_exact_kernels_and_names_what_is_wrong_with_others():
    def worse(gate: Tensor, up: Tensor) -> Tensor:
        return plain_kernels.swiglu(gate, up) * 1.001

    def never_back(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
        return plain_kernels.rotate(x, cos, sin, False)           # backward is not the transposed rotation

    def no_number(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = PLAIN.swiglu_backward(*inputs)
        return gate * torch.nan, up

    for kind in (Qwen2Config, MixtralConfig):
        for dtype in (torch.float32, torch.bfloat16):
            assert fused_misfit(kind(), dtype, CPU, PLAIN) is None
    for wrong in (Kernels(PLAIN.norm, PLAIN.norm_backward, worse, PLAIN.swiglu_backward, PLAIN.rotate),
                  Kernels(PLAIN.norm, PLAIN.norm_backward, PLAIN.swiglu, no_number, PLAIN.rotate),
                  Kernels(PLAIN.norm, PLAIN.norm_backward, PLAIN.swiglu, PLAIN.swiglu_backward, never_back)):
        assert "differ by" in (fused_misfit(Qwen2Config(), torch.float32, CPU, wrong) or "")
    assert "none of its" in (fused_misfit(GPT2Config(), torch.float32, CPU, PLAIN) or "")


def test_where_torch_has_no_fused_norm_the_rest_is_fused():
    kernels = Kernels(None, PLAIN.norm_backward, PLAIN.swiglu, PLAIN.swiglu_backward, PLAIN.rotate)
    assert set(fuse(small(LlamaConfig), kernels)) == {SWIGLU, ROTARY}


def test_fused_is_refused_by_name_where_it_cannot_be_had():
    for kernels in ("auto", "eager"):
        assert choose_kernels(kernels, LlamaConfig(), torch.float32, CPU) == (False, None)
    with pytest.raises(UserError, match=r"model.kernels=fused .*there is no GPU"):
        choose_kernels("fused", LlamaConfig(), torch.float32, CPU)


@pytest.mark.skipif(interpreter.MISSING, reason="triton is not installed: `make` puts it beside the environment on "
                                                "x86-64")
def test_tritons_kernels_compute_what_torchs_operations_compute():
    interpreter.check("check_fused_kernels.py")
