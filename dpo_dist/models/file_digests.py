"""Digests of the files of a model's folder: tensors, settings, tokenizer. No torch and no transformers here."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.safetensors_header import read_header
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.runtime.checksums import CHECKSUMS
from dpo_dist.runtime.files import sha256
from dpo_dist.runtime.json_files import needed_object
from dpo_dist.runtime.remember import remembered

Tensors = list[tuple[str, str, str]]         # (name, "dtype shape", digest of the bytes)
# Keys of config.json that do not change what the weights compute.
VOLATILE = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures",
            "_attn_implementation"}
OF_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
                "merges.txt", "added_tokens.json", "chat_template.jinja")
# what else decides how rows are rendered: the named templates, and at which tokens generation stops
BESIDE_TOKENIZER = ("additional_chat_templates/*.jinja", "generation_config.json")


def tensors_of(files: Sequence[Path], memory: Path | None) -> Tensors:
    """Of each tensor in these safetensors files. A file that is as it was when the folder `memory` learned of it is not
    read again. UserError where one ends too early."""
    return [(name, kind, digest) for file in files
            for name, kind, digest in remembered(memory, "tensors", file, _of_file)]


def _of_file(file: Path) -> Tensors:
    data, header = read_header(file)
    with file.open("rb") as f:
        def digest(name: str) -> str:
            start, end = (data + offset for offset in header[name]["data_offsets"])
            hashed = hashlib.blake2b(digest_size=16)
            while start < end:
                block = os.pread(f.fileno(), min(end - start, 1 << 24), start)
                if not block:
                    raise UserError(f"{file} ends before its tensor {name}: the file is truncated; copy it again")
                hashed.update(block)
                start += len(block)
            return hashed.hexdigest()

        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
            return [(name, f"{entry['dtype']} {entry['shape']}", digest)
                    for (name, entry), digest in zip(header.items(), pool.map(digest, header), strict=True)]


def tokenizer_digest(folder: Path) -> str:
    """Hex digest of the files that decide how text becomes ids."""
    digest = hashlib.blake2b(digest_size=16)
    for name in OF_TOKENIZER:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> dict[str, str]:
    """{file: sha256} of all that decides how rows become ids, as seen from the folder."""
    files = [folder / name for name in OF_TOKENIZER if (folder / name).is_file()]
    files += [file for pattern in BESIDE_TOKENIZER for file in sorted(folder.glob(pattern))]
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json as it is written, without the keys that do not change what the weights compute."""
    written = needed_object(folder / "config.json", "copy the model again")
    return {key: value for key, value in written.items() if key not in VOLATILE}


def described(folder: ModelFolder, memory: Path | None) -> dict[str, Any]:
    """JSON-ready: config.json and the digest of every tensor, and of the adapter where there is one what scales it and
    its tensors."""
    tensors = tensors_of(sorted(folder.base.glob("*.safetensors")), memory)
    adapter = None
    if folder.adapter is not None:
        adapter = {"settings": folder.adapter.numeric,
                   "tensors": _by_name(tensors_of([folder.adapter.weights], memory))}
    return {"settings": settings_of(folder.base), "tensors": _by_name(tensors), "adapter": adapter}


def exported(folder: Path, memory: Path | None = None) -> dict[str, Any]:
    """JSON-ready: the digest of every tensor of an exported folder, and of every other file but CHECKSUMS.json."""
    others = sorted(file for file in folder.rglob("*")
                    if file.is_file() and file.suffix != ".safetensors" and file.name != CHECKSUMS)
    return {"tensors": _by_name(tensors_of(sorted(folder.glob("*.safetensors")), memory)),
            "files": {str(file.relative_to(folder)): sha256(file) for file in others}}


def digest_of(content: Any) -> str:
    """Hex digest of something JSON-ready, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _by_name(tensors: Tensors) -> dict[str, str]:
    """{name: "dtype shape digest"}"""
    return {name: f"{kind} {digest}" for name, kind, digest in sorted(tensors)}
