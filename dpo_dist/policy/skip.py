"""An update that the device itself leaves out: the process never waits to learn whether the step was sound."""
from __future__ import annotations

import torch
from torch import Tensor


def prepare_update(optimizer: torch.optim.AdamW, lr: float, skip: Tensor | None) -> None:
    """The optimizer's next update has this learning rate. It changes no weight and no state where `skip`, a float32
    scalar on the device, is 1: torch's fused AdamW looks at `found_inf` in its kernel, for torch.amp.GradScaler.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skip  # type: ignore[attr-defined]
