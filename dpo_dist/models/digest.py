"""A digest of a model's content: its weights' bytes, whatever the file names, the sharding or the folder."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.safetensors_header import read_header
from dpo_dist.models.folder import truthful_json
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.runtime.remember import remembered
from dpo_dist.runtime.world import World

Tensors = list[tuple[str, str, str]]         # (name, "dtype shape", digest of the bytes)
# Keys of config.json that do not change what the weights compute.
_VOLATILE = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures",
             "_attn_implementation"}


def model_digest(folder: Path, memory: Path | None = None, world: World | None = None) -> str:
    """Hex digest of every tensor (name, dtype, shape, bytes) and of the config's numeric meaning.

    Read from the files, never from a live model: under ZeRO-3 a rank's parameters are empty shells. With `memory`, a
    folder, a file that is as it was is not read again. With `world`, all ranks call this and each reads its share.
    """
    files = sorted(folder.glob("*.safetensors"))
    shares = ([_of_files(files, memory)] if world is None else
              world.together(lambda: _of_files(files[world.rank::world.size], memory)))
    config = {k: v for k, v in truthful_json(folder).items() if k not in _VOLATILE}
    whole = hashlib.blake2b(digest_size=16)
    for name, kind, digest in sorted(tensor for share in shares for tensor in share):
        whole.update(f"{name}\0{kind}\0{digest}\n".encode())
    whole.update(json.dumps(config, sort_keys=True).encode())
    return whole.hexdigest()


def folder_digest(folder: ModelFolder, memory: Path | None = None, world: World | None = None) -> str:
    """Hex digest of a model's content, with that of its adapter where it is one: the adapter's tensors, and what scales
    them. As model_digest."""
    base = model_digest(folder.base, memory, world)
    if folder.adapter is None:
        return base
    whole = hashlib.blake2b(base.encode(), digest_size=16)
    for name, kind, digest in sorted(_of_files([folder.adapter.weights], memory)):
        whole.update(f"{name}\0{kind}\0{digest}\n".encode())
    whole.update(json.dumps(folder.adapter.numeric, sort_keys=True).encode())
    return whole.hexdigest()


def _of_files(files: Sequence[Path], memory: Path | None) -> Tensors:
    return [(name, kind, digest) for file in files
            for name, kind, digest in remembered(memory, "tensors", file, _of_file)]


def _of_file(file: Path) -> Tensors:
    """Of each tensor."""
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
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt", "added_tokens.json", "chat_template.jinja")
    for name in names:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    return digest.hexdigest()
