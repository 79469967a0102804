"""Tensors on their way into a safetensors file: copied to the CPU's memory first, or straight from where they are."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import torch
import xxhash
from torch import Tensor

from dpo_dist.runtime.checksums import Checksum, as_checksum
from dpo_dist.runtime.files import sync_file

BLOCK = 16 << 20                           # bytes that are hashed and written at once
# as the format names them (safetensors' README)
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the tensors; the header is small beside them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def copy_size(self) -> int:
        """Bytes of memory that copies take at most: torch rounds pinned memory up to a power of two."""
        return sum(1 << (tensor.nbytes - 1).bit_length() if tensor.is_cuda or tensor.is_pinned() else tensor.nbytes
                   for tensor in self.tensors.values())

    def copied(self, into: TensorFile | None = None) -> TensorFile:
        """The same with copies in the CPU's memory, pinned where they come from a GPU: what it holds stays as it is
        now, whatever becomes of the tensors. into: earlier copies that nobody needs any more; those of the same shapes
        are written over, as memory that a process has is filled three times as fast as new memory."""
        old = into.tensors if into else {}
        copies = {name: _start_copy(tensor, old.get(name)) for name, tensor in self.tensors.items()}
        if any(tensor.is_cuda for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        return replace(self, tensors=copies)

    def write(self, path: Path) -> Checksum:
        """Writes the file and syncs it to disk; its checksum, of what was handed to the system. One tensor at a time
        comes to the CPU."""
        digest, size = xxhash.xxh3_128(), 0
        with path.open("wb", buffering=0) as file:
            for block in self._blocks():
                digest.update(block)
                _write_all(file, block)
                size += len(block)
            sync_file(file)
        return as_checksum(size, digest.hexdigest())

    def _header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        end = 0
        for name, tensor in self._ordered():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)                # tensors begin at a multiple of 8 bytes
        return len(content).to_bytes(8, "little") + content

    def _blocks(self) -> Iterator[bytes | memoryview]:
        yield self._header()
        for _, tensor in self._ordered():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            content = memoryview(cast(bytearray, flat.numpy()))
            for start in range(0, len(content), BLOCK):
                yield content[start:start + BLOCK]

    def _ordered(self) -> list[tuple[str, Tensor]]:
        """Wide elements first, so that each tensor is aligned to its own."""
        return sorted(self.tensors.items(), key=lambda item: -item[1].dtype.itemsize)


def _start_copy(tensor: Tensor, old: Tensor | None) -> Tensor:
    source = tensor.detach()
    if old is None or (old.shape, old.dtype) != (source.shape, source.dtype):
        old = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    return old.copy_(source, non_blocking=source.is_cuda)


def _write_all(file: BinaryIO, block: bytes | memoryview) -> None:
    """Writes the whole block: a full disk takes a part of it first, and says so at the next."""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest):]
