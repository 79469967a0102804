"""The MinHash signature of a prompt, in bands: two prompts that share one are worth a comparison (near.py)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

BANDS, ROWS = 25, 5                          # prompts alike by 0.7 share a band with 99 %, by 0.3 with 6 %
MOST_WORDS = 128                             # distinct ones that are kept of a prompt
SEED = 1


def bands_of(texts: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """(n, BANDS) a hash of each band of the signatures of some texts, each its words in order."""
    if not texts:
        return np.empty((0, BANDS), "<u4")
    tokens = []
    for words in texts:
        whole = words.astype("<u8")
        tokens.append([*whole.tolist(), *((whole[:-1] << np.uint64(32)) | whole[1:]).tolist()])
    matrix = RMinHash.digest_matrix_from_token_hash_sets(tokens, BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows(), dtype="<u8").reshape(len(texts), BANDS, ROWS)
    mixed = np.zeros((len(texts), BANDS), "<u8")
    for row in range(ROWS):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, row] + np.uint64(1)
    return (mixed >> np.uint64(32)).astype("<u4")
