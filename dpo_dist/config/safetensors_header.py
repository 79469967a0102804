"""What a safetensors file holds, by its header: u64 header size, JSON header, data. No torch here: plans ask it too."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """(where the data begins in the file, {tensor: its dtype, shape and data_offsets from there})."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header
