"""Where a model is: the folder of its weights and, where there is one, the adapter on them. No transformers here, which
takes seconds to import."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.adapter import ADAPTER_WEIGHTS, Adapter, base_not_found, is_adapter, read_adapter
from dpo_dist.config.errors import UserError
from dpo_dist.models.hub import hub_folder

SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
READ = ("*.safetensors", *SMALL)           # what is read of a model's folder
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class ModelFolder:
    """What a model is loaded from."""

    base: Path                             # a transformers model: config.json and weights
    adapter: Adapter | None = None         # on the base's layers

    @property
    def tokenizer(self) -> Path:
        """The folder with its tokenizer and chat template: the adapter's own where it has one."""
        if self.adapter is not None and has_tokenizer(self.adapter.folder):
            return self.adapter.folder
        return self.base


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def resolve(path: str, key: str, offline: bool, wanted: Sequence[str] = READ) -> ModelFolder:
    """Where a model is that is given as a folder or a hub name. UserError naming `key`. wanted: patterns of the files
    that are downloaded."""
    folder = _folder(path, key, offline, (ADAPTER_WEIGHTS, *wanted))
    if not is_adapter(folder):
        if not (folder / "config.json").is_file():
            raise UserError(f"{key}={path} has no config.json; give the folder of a transformers model")
        return ModelFolder(folder)
    adapter = read_adapter(folder, key)
    base = adapter.base_folder()
    if base is None:
        try:
            base = hub_folder(adapter.hub_name, key, offline, wanted)
        except UserError as error:
            raise base_not_found(adapter, key, offline) from error
    if is_adapter(base):
        raise UserError(f"{key}={path} is an adapter on another adapter ({base}); merge that one into its base first")
    if not (base / "config.json").is_file():
        raise UserError(f"{key}={path} is an adapter for {base}, which has no config.json; correct "
                        "base_model_name_or_path in its adapter_config.json")
    return ModelFolder(base, adapter)


def _folder(path: str, key: str, offline: bool, wanted: Sequence[str]) -> Path:
    return Path(path) if Path(path).is_dir() else hub_folder(path, key, offline, wanted)
