"""Frozen weights in 4 bits under LoRA: NormalFloat in blocks of 64, whose scales are quantized once more (QLoRA, arXiv
2305.14314, section 3). bitsandbytes quantizes and multiplies; every such weight has its `quant_state`."""
from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_dist.config.errors import UserError
from dpo_dist.models.folder import quantization
from dpo_dist.models.text import backbone, empty_lm

OLDEST = "0.50"                            # bitsandbytes; what was tried
BLOCK = 64                                 # weights with one scale


def check_library(key: str) -> None:
    """UserError where bitsandbytes is missing or too old."""
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = ""
    if not found or Version(found) < Version(OLDEST):
        raise UserError(f"{key} needs bitsandbytes {OLDEST} or newer, but {found or 'none'} is installed; "
                        "pip install 'dpo-dist[qlora]'")


# ------------------------------------------------------------------------------------------------------- which layers


def text_layers(config: PretrainedConfig) -> tuple[list[str], list[str]]:
    """Names of the language model's linear layers: (those that can be quantized, those whose rows are no whole blocks).
    The latter stay whole: on a CPU, bitsandbytes 0.50 gives them wrong numbers without a word."""
    text = backbone(lm := empty_lm(config))
    inside = {id(module) for module in text.modules()}
    sizes = {name: _inputs(m) for name, m in _linear(lm) if id(m) in inside}
    return ([name for name, inputs in sizes.items() if not inputs % BLOCK],
            [name for name, inputs in sizes.items() if inputs % BLOCK])


def describe(config: PretrainedConfig, folder: str) -> str:
    """For a person, what model.quantization makes of a model. UserError where it makes nothing."""
    if how := quantization(config):
        return f"weights: as in the files of {folder} ({how})"
    layers, whole = text_layers(config)
    if not layers:
        raise UserError(f"model.quantization=nf4 would do nothing: {folder} has no linear layers with rows of whole "
                        f"blocks of {BLOCK} weights; remove it")
    lm = empty_lm(config)
    share = sum(lm.get_submodule(name).weight.numel() for name in layers) / sum(p.numel() for p in lm.parameters())
    but = f" (not {len(whole)} such as {whole[0]}: rows of no whole blocks)" if whole else ""
    return f"weights: {len(layers)} linear layers in 4 bits (nf4), {share:.0%} of the model{but}"


def _linear(lm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What bitsandbytes' layers replace, when transformers loads a model."""
    yield from ((name, m) for name, m in lm.named_modules() if type(m) in (nn.Linear, Conv1D))


def _inputs(layer: Any) -> int:
    return layer.nx if isinstance(layer, Conv1D) else layer.in_features


# ------------------------------------------------------------------------------------------------------------ loading


def loading(config: PretrainedConfig, how: str, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained is told besides, for a value of model.quantization. Files that hold 4 bits stay as they are.
    """
    if how == "none" or quantization(config):
        return {}
    layers, _ = text_layers(config)
    # the output head, what sees images
    others = [name for name, _ in _linear(empty_lm(config)) if name not in set(layers)]
    return {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=how, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others)}


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives 4-bit layers one arithmetic: in `dtype`, whatever their files say, the same in training and evaluation.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 would repack a weight at the first forward in evaluation, compute in
    bf16 from then on (in fp32 7e-3 off), and let no gradient through. Checkpoints hold what is trained; a frozen
    layer's scales would be in them. Exports hold whole weights; transformers would make 4-bit ones of them, and cannot.
    """
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [c for c in conversions if not any(
            "bitsandbytes" in type(operation).__module__ for operation in getattr(c, "operations", ()))]
    for name, layer in _four_bit(model):
        state = layer.weight.quant_state
        if layer.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise UserError(f"{name} has rows of {state.shape[-1]} weights in blocks of {state.blocksize}, which "
                            "bitsandbytes computes wrongly on a CPU; use a GPU, or the full weights")
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        layer.support_avx512bf16_for_cpu = False
        vars(layer)["_save_to_state_dict"] = MethodType(nn.Module._save_to_state_dict, layer)


def adapters_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Gives adapters, trained and frozen ones, the dtype that peft takes from full weights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _four_bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, m) for name, m in model.named_modules() if is_four_bit(getattr(m, "weight", None)))


def is_four_bit(weight: Any) -> bool:
    return getattr(weight, "quant_state", None) is not None


def recipe(config: PretrainedConfig, how: str) -> str | None:
    """What the keys of the reference's values say of its quantized weights; None where they are full."""
    if files := quantization(config):
        return f"{files}, computed in model.dtype" if trainable(config) else files
    return None if how == "none" else f"{how} by bitsandbytes, double quantization"


def trainable(config: Any) -> bool:
    """Whether a model's files hold what model.quantization=nf4 makes of full weights."""
    how = config.quantization_config if quantization(config) else {}
    how = how if isinstance(how, dict) else how.to_dict()
    return bool(how.get("load_in_4bit")) and how.get("bnb_4bit_quant_type") == "nf4"


# ------------------------------------------------------------------------------------------------------------- export


def whole_weight(layer: Any, weight: Any) -> Tensor:
    """A layer's weight as its forward multiplies with it, (outputs, inputs)."""
    if not is_four_bit(weight):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype)


def as_in_files(layer: Any, weight: Tensor) -> Tensor:
    """The whole weight as the model's files have it: GPT-2's are (inputs, outputs), and turned when quantized."""
    return weight.T if getattr(layer, "source_cls", None) is Conv1D else weight


def is_scale(name: str) -> bool:
    """Whether a tensor in a model's files goes with a 4-bit weight, which exports have whole."""
    return re.search(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.)", name) is not None
