"""How a pack's logits are cut into blocks of the vocabulary, and which are kept for backward. Pure; no torch here."""
from __future__ import annotations

from dataclasses import dataclass

# widths are multiples of it: product kernels want 16-byte aligned columns, and whole tiles
COLUMNS = 256
AT_ONCE = {"cpu": 2**24, "cuda": 2**27}    # elements of the logits that exist at once, whatever the vocabulary
# logits of a pack up to this size are kept, so that backward computes no product twice
KEPT_BYTES = {"cpu": 0, "cuda": 2**32}


@dataclass(frozen=True)
class Blocks:
    """Columns [0, vocabulary) in blocks of `width`; the last one is what is left."""

    vocabulary: int
    width: int
    kept: int                              # blocks whose logits are kept from forward to backward, the last ones

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first column, end) of each block."""
        return [(at, min(at + self.width, self.vocabulary)) for at in range(0, self.vocabulary, self.width)]


def plan_blocks(rows: int, vocabulary: int, bytes_each: int, device: str) -> Blocks:
    """The blocks of (rows, vocabulary) logits of so many bytes an element, on a "cpu" or "cuda" device.

    At least the last block is kept: backward begins with it, and needs one block of logits anyway.
    """
    rows = max(1, rows)
    width = max(COLUMNS, AT_ONCE[device] // rows // COLUMNS * COLUMNS)
    count = -(-vocabulary // width)
    return Blocks(vocabulary, width, count if rows * vocabulary * bytes_each <= KEPT_BYTES[device] else 1)
