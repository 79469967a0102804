"""A digest of a model's content: its weights' bytes, whatever the file names, the sharding or the folder."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dpo_dist.models.file_digests import VOLATILE, tensors_of
from dpo_dist.models.folder import truthful_json
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.runtime.world import World


def model_digest(folder: Path, memory: Path | None = None, world: World | None = None) -> str:
    """Hex digest of every tensor (name, dtype, shape, bytes) and of the config's numeric meaning.

    Read from the files, never from a live model: under ZeRO-3 a rank's parameters are empty shells. With `memory`, a
    folder, a file that is as it was is not read again. With `world`, all ranks call this and each reads its share.
    """
    files = sorted(folder.glob("*.safetensors"))
    shares = ([tensors_of(files, memory)] if world is None else
              world.together(lambda: tensors_of(files[world.rank::world.size], memory)))
    config = {k: v for k, v in truthful_json(folder).items() if k not in VOLATILE}
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
    for name, kind, digest in sorted(tensors_of([folder.adapter.weights], memory)):
        whole.update(f"{name}\0{kind}\0{digest}\n".encode())
    whole.update(json.dumps(folder.adapter.numeric, sort_keys=True).encode())
    return whole.hexdigest()
