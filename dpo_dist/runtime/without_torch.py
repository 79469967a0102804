"""torch_hidden: transformers' tokenizers without torch, whose import takes longer than what they are asked for."""
from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Inside, transformers takes torch for not installed, and from now on so does `datasets`; unless they know better
    already. Neither needs it here, and its import takes longer than all else."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    os.environ["USE_TORCH"] = "0"                        # for `datasets`
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"              # it would say that models need torch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
