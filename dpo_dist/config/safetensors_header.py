"""What a safetensors file holds, by its header: u64 header size, JSON header, data. No torch here: plans ask it too."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """(where the data begins in the file, {tensor: its dtype, shape and data_offsets from there}). UserError where the
    file is cut, or no safetensors file."""
    try:
        with file.open("rb") as f:
            whole, size = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(min(size, whole)))
        header.pop("__metadata__", None)
        ends = [_end(entry) for entry in header.values()]
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it does not begin as a safetensors file does ({error}); copy it again"
                        ) from error
    if 8 + size + max(ends, default=0) > whole:
        raise UserError(f"{file} has {whole:,} bytes and ends before its tensors do: it is truncated; copy it again")
    return 8 + size, header


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor's data ends. One of several kinds of errors where the entry is none."""
    (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    whole_numbers = isinstance(shape, list) and all(type(n) is int for n in (start, end, *shape))
    if not whole_numbers or not isinstance(dtype, str):
        raise ValueError("a tensor's dtype, shape or data_offsets are none")
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise ValueError("a tensor's shape or data_offsets are negative")
    return end
