"""The language model inside a checkpoint. Of one that also sees images it is a part, which text rows train; the rest
stays as it is."""
from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from dpo_dist.config.errors import UserError
from dpo_dist.models.sharded import apart_from_sharding

TEXT = ("self", "input_ids")               # what a forward may demand


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


def text_part(config: PretrainedConfig) -> str | None:
    """Under which name a config holds the language model's; None where it is the whole."""
    if not has_other_parts(config):
        return None
    return next(name for name, part in vars(config).items() if part is text_config(config))


def lm_class(config: PretrainedConfig) -> Any:
    """The class that holds all of the checkpoint, so that all of it can be exported. UserError where there is none, or
    where it takes no text alone."""
    preferred = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in preferred[::-1] if has_other_parts(config) else preferred:
        if type(config) in mapping:
            found = mapping[type(config)]
            needed = [p.name for p in inspect.signature(found.forward).parameters.values()
                      if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in TEXT]
            if needed:
                raise UserError(f"config.json describes a {config.model_type}, which takes no text alone (it needs "
                                f"{', '.join(needed)}); give a causal language model")
            return found
    raise UserError(f"config.json describes a {config.model_type}, which transformers has no causal language model "
                    "for; give a causal language model")


def empty_lm(config: PretrainedConfig) -> Any:
    """The model with shapes and no bytes, on torch's meta device; whole also where models are loaded sharded."""
    with apart_from_sharding(), torch.device("meta"):
        return lm_class(config)(copy.deepcopy(config))


def backbone(lm: Any) -> Any:
    """The module that turns token ids into last hidden states: `lm` without its head and what sees images."""
    if not has_other_parts(lm.config) and lm.base_model is not lm:
        return lm.base_model
    model = lm.get_decoder()
    while model.get_output_embeddings() is not None:                          # a language model with a head of its own
        inner = (child for child in model.children() if isinstance(child, PreTrainedModel))
        model = next(inner) if model.base_model is model else model.base_model
    return model


def output_head(lm: Any) -> Any:
    """The module that turns hidden states into logits, also of a language model inside; None where there is none."""
    heads = (m.get_output_embeddings() for m in lm.modules() if isinstance(m, PreTrainedModel))
    return next((head for head in heads if head is not None), None)


def head_name(lm: Any) -> str | None:
    """The name of the output head's module; None where there is none."""
    head = output_head(lm)
    return None if head is None else next(name for name, module in lm.named_modules() if module is head)


def weights_between(lm: Any) -> list[str]:
    """Names of a language model's weights that are neither its backbone's nor its head's."""
    if has_other_parts(lm.config):
        return []
    known = {id(p) for module in (backbone(lm), output_head(lm)) for p in module.parameters()}
    return [name for name, p in lm.named_parameters() if id(p) not in known]


def layer_stack(lm: Any) -> nn.ModuleList:
    """The language model's decoder layers."""
    stacks = [module for module in backbone(lm).modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len)


def freeze_other_parts(lm: Any) -> None:
    """Text rows train the language model and its head; whatever else the checkpoint has keeps its weights."""
    if has_other_parts(lm.config):
        lm.requires_grad_(False)
        for weight in backbone(lm).parameters():
            weight.requires_grad_(weight.is_floating_point())                 # 4-bit weights cannot
        if (head := output_head(lm)) is not None:
            head.requires_grad_(True)
