"""Folders that try to run code: each would make the file `canary`, if anything of it ran."""
from __future__ import annotations

import json
import pickle
import shlex
import subprocess
from pathlib import Path
from typing import Any

from conftest import write_tiny_llama

CODE = "__import__('pathlib').Path({canary!r}).touch()\n"
# what a config.json, tokenizer_config.json, ... names in auto_map
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel",
            "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"], "AutoProcessor": "own.OwnProcessor",
            "AutoImageProcessor": "own.OwnProcessor"}


class Bomb:
    """A pickle of it makes the file when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return subprocess.getoutput, (f"touch {shlex.quote(str(self.canary))}",)


def write_pickle(file: Path, canary: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps({"weight": Bomb(canary)}))
    return file


def change_json(file: Path, **keys: object) -> None:
    """The file with other keys, new or not."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **keys}))


def write_untrusted(folder: Path, canary: Path, model_type: str = "own", named_in: tuple[str, ...] = ("config.json",),
                    ) -> Path:
    """A tiny Llama of another model_type, whose files (`named_in`) name code that lies beside them."""
    write_tiny_llama(folder)
    (folder / "own.py").write_text(CODE.format(canary=str(canary)) + "class OwnConfig: pass\nOwnModel = OwnConfig\n"
                                   "OwnTokenizer = OwnProcessor = OwnConfig\n")
    change_json(folder / "config.json", model_type=model_type)
    for name in named_in:
        change_json(folder / name, auto_map=AUTO_MAP)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        CODE.format(canary=str(canary)) + "def generate(model, *args, **kwargs): raise SystemExit\n")
    return folder
