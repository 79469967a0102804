"""A model's tokenizer. Apart from load.py, since looking at tokens needs none of the models' code."""
from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_dist.models.hub import hub_folder

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def tokenizer_folder(path: str, key: str, offline: bool) -> Path:
    """The local folder of a model given as a folder or a hub name, of which only the small files are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    return hub_folder(path, key, offline, ["*.json", "*.model", "*.txt", "*.jinja"])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, or None where there is none (token_ids data needs none)."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
