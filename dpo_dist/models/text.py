"""The language model inside a checkpoint. Of one that also sees images it is a part, which text rows train; the rest
stays as it is."""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig

from dpo_dist.config.errors import UserError


def text_config(config: PretrainedConfig) -> Any:
    """The language model's part of a config: all of it, unless the model has other parts."""
    return config.get_text_config(decoder=True)


def has_other_parts(config: PretrainedConfig) -> bool:
    """Whether the language model is a part of a model that also sees images."""
    return text_config(config) is not config


def setting(config: PretrainedConfig, key: str) -> Any:
    """A config's value; None where it has none, or where layers differ and only their own configs tell."""
    try:
        return getattr(config, key, None)
    except Exception:                      # transformers' own kind, which versions before 5.20 do not have
        return None


def lm_class(config: PretrainedConfig) -> Any:
    """The class that holds all of the checkpoint, so that all of it can be exported. UserError where there is none."""
    if has_other_parts(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"config.json describes a {config.model_type}, which transformers has no causal language model "
                        "for; give a causal language model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def empty_lm(config: PretrainedConfig) -> Any:
    """The model with shapes and no bytes, on torch's meta device; whole also where models are loaded sharded."""
    with torch.device("meta"):
        return lm_class(config)(copy.deepcopy(config))


def backbone(lm: Any) -> Any:
    """The module that turns token ids into last hidden states: `lm` without its head and what sees images."""
    return lm.get_decoder().base_model if has_other_parts(lm.config) else lm.base_model


def head_name(lm: Any) -> str | None:
    """The name of the output head's module; None where there is none."""
    head = lm.get_output_embeddings()
    return next((name for name, module in lm.named_modules() if module is head), None)


def layer_stack(lm: Any) -> nn.ModuleList:
    """The language model's decoder layers."""
    stacks = [module for module in backbone(lm).modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len)


def freeze_other_parts(lm: Any) -> None:
    """Text rows train the language model and its head; whatever else the checkpoint has keeps its weights."""
    if has_other_parts(lm.config):
        lm.requires_grad_(False)
        backbone(lm).requires_grad_(True)
        lm.get_output_embeddings().requires_grad_(True)
