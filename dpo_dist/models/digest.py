"""A digest of a model's content: its weights' bytes, whatever the file names, the sharding or the folder."""
from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.models.folder import truthful_json

# Keys of config.json that do not change what the weights compute.
_VOLATILE = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures",
             "_attn_implementation"}


def model_digest(folder: Path) -> str:
    """Hex digest of every tensor (name, dtype, shape, bytes) and of the config's numeric meaning.

    Read from the files, never from a live model: under ZeRO-3 a rank's parameters are empty shells.
    """
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(max_workers=4) as pool:      # hashing releases the interpreter lock
        tensors = sorted(entry for entries in pool.map(_tensor_digests, files) for entry in entries)
    config = {k: v for k, v in truthful_json(folder).items() if k not in _VOLATILE}
    whole = hashlib.blake2b(digest_size=16)
    for name, kind, digest in tensors:
        whole.update(f"{name}\0{kind}\0{digest}\n".encode())
    whole.update(json.dumps(config, sort_keys=True).encode())
    return whole.hexdigest()


def _tensor_digests(file: Path) -> list[tuple[str, str, str]]:
    """(name, "dtype shape", digest of the bytes) of each tensor. safetensors: u64 header size, JSON header, data."""
    out = []
    with file.open("rb") as f:
        header_size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(header_size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            f.seek(8 + header_size + start)
            digest = hashlib.blake2b(digest_size=16)
            left = end - start
            while left > 0:
                block = f.read(min(left, 1 << 24))
                if not block:
                    raise UserError(f"{file} ends before its tensor {name}: the file is truncated; copy it again")
                digest.update(block)
                left -= len(block)
            out.append((name, f"{entry['dtype']} {entry['shape']}", digest.hexdigest()))
    return out


def tokenizer_digest(folder: Path) -> str:
    """Hex digest of the files that decide how text becomes ids."""
    digest = hashlib.blake2b(digest_size=16)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt", "added_tokens.json", "chat_template.jinja")
    for name in names:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    return digest.hexdigest()
