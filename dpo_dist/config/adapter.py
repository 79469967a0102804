"""A LoRA adapter's folder (PEFT's adapter_config.json and adapter_model.safetensors). No torch here: plans and errors
ask it too."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.safetensors_header import read_header

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it with peft (merge_and_unload) and give the merged model"

# What decides the numbers besides the tensors and their names, with peft's defaults.
_NUMERIC: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "rank_pattern": {},
                            "alpha_pattern": {}, "fan_in_fan_out": False}
# What else may be set: where the adapter belongs, and how it was made and trained.
_KNOWN = {*_NUMERIC, "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
          "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
          "lora_dropout", "bias", "init_lora_weights", "inference_mode", "loftq_config", "eva_config", "corda_config",
          "lora_ga_config", "megatron_core", "qalora_group_size"}
# How A and B may have been made. Others change the base's weights too.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says of a LoRA adapter, which is one that can be computed here."""

    folder: Path
    settings: Mapping[str, Any]            # adapter_config.json

    @property
    def base(self) -> str:
        return str(self.settings["base_model_name_or_path"])

    @property
    def hub_name(self) -> str:
        """The base as a hub model: owner/model, or owner/model@revision."""
        revision = self.settings.get("revision")
        return f"{self.base}@{revision}" if revision else self.base

    @property
    def dropout(self) -> float:
        return float(self.settings.get("lora_dropout") or 0.0)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        return tuple(self.settings.get("modules_to_save") or ())

    @property
    def weights(self) -> Path:
        return self.folder / ADAPTER_WEIGHTS

    @property
    def numeric(self) -> dict[str, Any]:
        """What decides the numbers besides the tensors and their names."""
        return {key: value if (value := self.settings.get(key)) is not None else default
                for key, default in _NUMERIC.items()}

    @property
    def elements(self) -> int:
        """Of all its tensors."""
        return sum(math.prod(entry["shape"]) for entry in read_header(self.weights)[1].values())

    def base_folder(self) -> Path | None:
        """The base's folder: as it is written, or as seen from the adapter's folder; None where it is none of them."""
        return next((place for place in (Path(self.base), self.folder / self.base) if place.is_dir()), None)

    def described(self) -> str:
        """In words, for a person and a model card."""
        kinds = [word for key, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if self.numeric[key]]
        return f"{', '.join(kinds) or 'LoRA'} rank {self.numeric['r']}"


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def names_adapter(path: str) -> bool:
    """Whether a folder, or a model in the local hub cache, is an adapter. A hub model that is not there yet is none."""
    if Path(path).is_dir():
        return is_adapter(Path(path))
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        name, _, revision = path.partition("@")
        return isinstance(try_to_load_from_cache(name, ADAPTER, revision=revision or None), str)
    except HFValidationError:                            # a path that no hub model has
        return False


def read_adapter(folder: Path, key: str) -> Adapter:
    """The adapter in a folder that has an adapter_config.json. UserError, naming `key`, where it is not one that can be
    computed here."""
    named = f"{key}={folder}"
    try:
        settings = json.loads((folder / ADAPTER).read_text())
    except ValueError as error:
        raise UserError(f"{named}: {ADAPTER} is no JSON ({error}); copy the adapter again") from error
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{named} is an adapter of type {kind}; only LoRA adapters are computed here. If its type can "
                        f"be merged, {MERGE}")
    if not settings.get("base_model_name_or_path"):
        raise UserError(f"{named}: {ADAPTER} names no base; set base_model_name_or_path in it to the model that the "
                        "adapter is for")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{named} is an adapter for task_type={settings['task_type']}; give one of a causal language "
                        "model")
    for name, value in _not_computed(settings).items():
        raise UserError(f"{named}: {ADAPTER} says {name}={value}, which is not computed here; {MERGE}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{named}: {_without_weights(folder)}")
    adapter = Adapter(folder, settings)
    if others := [name for name in read_header(adapter.weights)[1] if not _is_own(name, adapter)]:
        raise UserError(f"{named} holds weights of the base itself ({others[0]}; {len(others)} in all), as where the "
                        f"vocabulary was resized; {MERGE}")
    return adapter


def _is_own(name: str, adapter: Adapter) -> bool:
    """Whether a tensor is part of LoRA, or of a module that was trained whole."""
    module = name.rpartition(".")[0]
    return ".lora_" in name or any(module.endswith(saved) for saved in adapter.modules_to_save)


def _not_computed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is set and is no part of LoRA as it is computed here."""
    found = {name: value for name, value in settings.items() if name not in _KNOWN and value}
    if settings.get("bias") not in (None, "none"):
        found["bias"] = settings["bias"]
    if settings.get("init_lora_weights", True) not in _STARTS:
        found["init_lora_weights"] = settings["init_lora_weights"]
    return found


def _without_weights(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return ("its weights are a pickle (adapter_model.bin), which may run code; load it with peft and save it again "
                "(save_pretrained writes safetensors)")
    if (folder / "config.json").is_file():
        return (f"there is an {ADAPTER} and no {ADAPTER_WEIGHTS}; if its model.safetensors is merged already, take "
                f"{ADAPTER} out of the folder")
    return f"there is no {ADAPTER_WEIGHTS}; copy the adapter again"


def base_not_found(adapter: Adapter, key: str, offline: bool) -> UserError:
    remedy = "correct base_model_name_or_path there" + (", or set run.offline=false to download it" if offline else "")
    return UserError(f"{key}={adapter.folder} is an adapter for '{adapter.base}' (base_model_name_or_path in its "
                     f"{ADAPTER}), which is neither a folder nor a model in the local hub cache; {remedy}")


def local_folders(path: str, key: str) -> tuple[Path, Adapter | None]:
    """(the folder of config.json and weights, the adapter on it) of a path that is a folder; no hub is asked. UserError
    where an adapter's base is no folder."""
    folder = Path(path)
    if not is_adapter(folder):
        return folder, None
    adapter = read_adapter(folder, key)
    base = adapter.base_folder()
    if base is None:
        raise UserError(f"{key}={path} is an adapter for '{adapter.base}', which is no folder here; sizes are "
                        "predicted from its config.json: correct base_model_name_or_path")
    return base, adapter
