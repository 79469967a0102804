"""What the trials of kernels and architectures share: how far their numbers are off, and what went wrong."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def worst_error(found: Sequence[Tensor], wanted: Sequence[Tensor], floor: float = 0.0) -> float:
    """The largest error of these tensors: the difference's norm over that of `wanted`, which counts as at least
    `floor`. In fp32; NaN where anything is NaN."""
    errors = [(a.float() - b.float()).norm() / b.float().norm().clamp(min=floor)
              for a, b in zip(found, wanted, strict=True)]
    return torch.stack(errors).max().item()              # unlike Python's max, it keeps a NaN


def first_line(problem: Exception) -> str:
    """The error's type, and the first line of what it says."""
    return ": ".join([type(problem).__name__, *str(problem).splitlines()[:1]])
