"""What an export takes over from the folder of the model as it is: settings, tokenizer, chat templates. No torch and no
transformers here."""
from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from dpo_dist.models.resolve import ModelFolder
from dpo_dist.runtime.checksums import CHECKSUMS
from dpo_dist.runtime.files import sha256

# What is copied: files of tokenizers (of whatever name), chat templates, processors of images ...
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# ... and what is not: written anew, or of another training
NOT_COPIED = ("config.json", CHECKSUMS, "adapter_config.json", "*.index.json", "trainer_state.json", "*_results.json",
              "quantize_config.json", "requirements*.txt", "LICENSE*", "README*")
SETTINGS, OF_TOKENIZER = "*config.json", "tokenizer_config.json"       # of the model, but for the tokenizer's
NAMED_TEMPLATES = "additional_chat_templates"        # a folder: {name}.jinja


def settings_files(folder: Path) -> list[Path]:
    """The settings of the model and its processor, but for config.json, which is written anew."""
    return [file for file in _copied(folder) if _is_setting(file)]


def tokenizer_files(folder: Path) -> list[Path]:
    """What goes with the tokenizer, but for the folder of named templates."""
    return [file for file in _copied(folder) if not _is_setting(file)]


def copied_digests(model: ModelFolder) -> dict[str, str]:
    """{file: sha256} of all that an export takes over, as it is now, and of config.json, which it begins with."""
    files = [model.base / "config.json", *settings_files(model.base), *tokenizer_files(model.tokenizer)]
    named = sorted((model.tokenizer / NAMED_TEMPLATES).rglob("*.jinja"))
    return {file.name: sha256(file) for file in files} | {f"{NAMED_TEMPLATES}/{file.name}": sha256(file)
                                                          for file in named}


def _copied(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in COPIED and file.is_file()
            and not any(fnmatch(file.name, name) for name in NOT_COPIED)]


def _is_setting(file: Path) -> bool:
    return fnmatch(file.name, SETTINGS) and file.name != OF_TOKENIZER
