"""A model's tokenizer. Apart from load.py, since looking at tokens needs none of the models' code."""
from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_dist.config.adapter import is_adapter
from dpo_dist.config.errors import UserError
from dpo_dist.models.hub import hub_folder
from dpo_dist.models.resolve import SMALL, has_tokenizer, resolve
from dpo_dist.models.whole import check_whole


def tokenizer_folder(path: str, key: str, offline: bool) -> Path:
    """The local folder with the tokenizer of a model given as a folder or a hub name, of which only the small files are
    downloaded. An adapter without a tokenizer has its base's. UserError where they are not as they were exported."""
    folder = Path(path) if Path(path).is_dir() else hub_folder(path, key, offline, SMALL)
    check_whole(folder, key, wanted=SMALL)
    if not is_adapter(folder) or has_tokenizer(folder):
        return folder
    found = resolve(path, key, offline, SMALL).tokenizer
    check_whole(found, key, wanted=SMALL)
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, or None where there is none (token_ids data needs none). UserError where its
    files are none that transformers can read, or come with code of their own."""
    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:                           # the tokenizers' library raises nothing more special
        if "trust_remote_code" in str(error):
            raise UserError(f"the tokenizer in {folder} has code of its own (auto_map in tokenizer_config.json or "
                            "config.json), which is never run; save it as one that transformers has (tokenizer.json), "
                            "or take a newer transformers") from error
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the tokenizer in {folder} cannot be read ({what}); copy its files again") from error
