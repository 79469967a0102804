"""LoRA adapters (peft) on a model: fresh ones, and those of an adapter's folder."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_dist.config.adapter import ADAPTER, MERGE, Adapter
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig
from dpo_dist.models.load import load_causal_lm
from dpo_dist.models.quantized import adapters_in
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.text import backbone, has_other_parts, output_head

# The names of adapters in a model. The first is peft's own, and checkpoints hold it.
TRAINED, REFERENCE = "default", "reference"


def load_adapted(folder: ModelFolder, dtype: torch.dtype, attention: str, fused: bool = False,
                 quantization: str = "none") -> nn.Module:
    """The model of a folder, with its adapter where it is one. As load_causal_lm."""
    model = load_causal_lm(folder.base, dtype, attention, fused, quantization)
    if folder.adapter is None:
        return model
    adapted = add_adapter(model, folder.adapter)
    if quantization != "none":
        adapters_in(dtype, adapted)
    return adapted


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> nn.Module:
    """The model with fresh adapters (B = 0, so that it starts as the base) and its own weights frozen."""
    import peft

    _check_saved(model, lora.modules_to_save, "model.lora.modules_to_save")
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    elsewhere = None                                     # what sees images has layers of the same names
    if has_other_parts(model.config):
        trained = next(name for name, module in model.named_modules() if module is backbone(model))
        elsewhere = rf"(?!{re.escape(trained)}\.).*"
    torch.manual_seed(seed)                              # the same adapters on every rank
    named = f"model.lora.target_modules={lora.target_modules}"
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha or 2 * lora.rank, target_modules=targets, exclude_modules=elsewhere,
            modules_to_save=list(lora.modules_to_save) or None, use_rslora=lora.rslora, use_dora=lora.dora,
            task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        raise UserError(f"{named}: {error}") from error
    _check_layers(adapted, named)
    return adapted


def add_adapter(model: Any, adapter: Adapter, name: str = TRAINED) -> nn.Module:
    """The model with the adapter of a folder and its own weights frozen. TRAINED is trained on; another is frozen, and
    beside the one that is there. Without dropout. UserError where the adapter is not for this model."""
    import peft

    _check_saved(model if name == TRAINED else model.get_base_model(), adapter.modules_to_save,
                 f"{adapter.folder}: modules_to_save")
    config: Any = peft.LoraConfig.from_pretrained(str(adapter.folder))
    config.lora_dropout, config.init_lora_weights, config.inference_mode = 0.0, True, False
    config.task_type = "CAUSAL_LM"
    try:
        if name == TRAINED:
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        found = peft.set_peft_model_state_dict(model, safetensors.torch.load_file(adapter.weights), name)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        what = str(error).splitlines()[-1].strip()       # of torch's message, the line that names a tensor
        raise UserError(f"the adapter {adapter.folder} does not fit {adapter.base}: {what}") from error
    own = {key for key, _ in model.named_parameters() if is_of(key, name)}
    for what, keys in (("lacks", own & set(found.missing_keys)), ("has too much:", found.unexpected_keys)):
        if keys:
            raise UserError(f"the adapter {adapter.folder} does not fit {adapter.base}: it {what} {min(keys)} "
                            f"({len(keys)} tensors); give the base that it was trained on")
    _check_layers(model, f"the adapter {adapter.folder}")
    if name != TRAINED:
        model.set_adapter(TRAINED)
        for key, parameter in model.named_parameters():
            if is_of(key, name):
                parameter.requires_grad_(False)
    return model


def is_of(parameter: str, adapter: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return f".{adapter}." in parameter and (".lora_" in parameter or ".modules_to_save." in parameter)


def _check_layers(adapted: nn.Module, named: str) -> None:
    """UserError where adapters are on what is no linear layer, or on the output head."""
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    for name, module in base.named_modules():
        is_embedding = bool(getattr(module, "lora_embedding_A", None))
        if is_embedding or (hasattr(module, "base_layer") and not hasattr(module.base_layer, "weight")):
            raise UserError(f"{named} names '{name}', which is no linear layer; name linear layers")
        if hasattr(module, "base_layer") and module is output_head(base):
            raise UserError(f"{named} names the output head '{name}', which cannot have adapters here; leave it out, "
                            "or train it whole with modules_to_save")


def _check_saved(model: PreTrainedModel, names: Iterable[str], named: str) -> None:
    """UserError where a module that is to be trained whole cannot be: peft takes every module whose name ends so."""
    head, embedding = output_head(model), model.get_input_embeddings()
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    text = {id(module) for module in (*backbone(model).modules(), *head.modules())}
    for wanted in names:
        found = {name: module for name, module in model.named_modules() if name.endswith(wanted)}
        found = {name: getattr(module, "original_module", module) for name, module in found.items()}
        for name, module in found.items():
            if next(module.children(), None) is not None or next(module.parameters(), None) is None:
                raise UserError(f"{named} names '{name}', a {type(module).__name__}; name single modules with weights: "
                                "the embedding, norms, the output head, linear layers")
            if id(module) not in text:
                raise UserError(f"{named}: '{wanted}' also names '{name}', which text does not train; name more of it")
            if tied and module.weight is head.weight:
                raise UserError(f"{named} names '{name}', which is the embedding and the output head at once (tied "
                                f"embeddings) and cannot be trained beside adapters here; leave it out, or {MERGE}")
        if not found:
            raise UserError(f"{named}: the model has no module '{wanted}'; name one of its modules, such as "
                            "embed_tokens or lm_head")


# ---------------------------------------------------------------------------------------------------------- for export


def as_in_file(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the trained adapter by their names in the model → by those in adapter_model.safetensors."""
    import peft

    return peft.get_peft_model_state_dict(model, state_dict=tensors, adapter_name=TRAINED, save_embedding_layers=False)


def write_adapter_config(model: Any, folder: Path, base: str, revision: str | None) -> None:
    """Writes adapter_config.json of the trained adapter, for this base."""
    model.peft_config[TRAINED].save_pretrained(folder)
    written = json.loads((folder / ADAPTER).read_text())
    written |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    (folder / ADAPTER).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
