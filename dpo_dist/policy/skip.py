"""An update that the device itself leaves out: the process never waits to learn whether the step was sound."""
from __future__ import annotations

import torch
from torch import Tensor


def skip_update_if(optimizer: torch.optim.AdamW, skip: Tensor | None) -> None:
    """The optimizer's next updates change no weight and no state where `skip`, a float32 scalar on the device, is 1.

    torch's fused AdamW looks at `found_inf` in its kernel, as torch.amp.GradScaler uses it.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]
