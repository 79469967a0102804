"""A model's tokenizer. Apart from load.py, since looking at tokens needs none of the models' code."""
from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_dist.config.adapter import is_adapter
from dpo_dist.config.errors import UserError
from dpo_dist.models.hub import hub_folder
from dpo_dist.models.resolve import SMALL, has_tokenizer, resolve


def tokenizer_folder(path: str, key: str, offline: bool) -> Path:
    """The local folder with the tokenizer of a model given as a folder or a hub name, of which only the small files are
    downloaded. An adapter without a tokenizer has its base's."""
    folder = Path(path) if Path(path).is_dir() else hub_folder(path, key, offline, SMALL)
    if not is_adapter(folder) or has_tokenizer(folder):
        return folder
    return resolve(path, key, offline, SMALL).tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, or None where there is none (token_ids data needs none). UserError where it
    comes with code of its own."""
    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(f"the tokenizer in {folder} has code of its own (auto_map in tokenizer_config.json or "
                        "config.json), which is never run; save it as one that transformers has (tokenizer.json), or "
                        "take a newer transformers") from error
