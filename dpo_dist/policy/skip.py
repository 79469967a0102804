"""An update that is left out: the process need not wait to learn whether the step was sound."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prepare_update(optimizer: torch.optim.Optimizer, lr: float, skip: Tensor | None) -> None:
    """The optimizer's next update has this learning rate, times the `lr_ratio` of a group that has one. It changes no
    weight and no state where `skip`, a float32 scalar on the device, is 1. Every optimizer here looks at `found_inf`,
    as torch's fused AdamW does in its kernel, for torch.amp.GradScaler.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.found_inf = skip  # type: ignore[attr-defined]


class SkipsOnHost:
    """Before a torch optimizer, as a base class, that knows no `found_inf`: the process itself looks at it, and waits
    for the device."""

    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        skip = self.found_inf
        if skip is not None and bool(skip):
            return None
        self.found_inf = None                            # some of torch's refuse to see one
        result = super().step(closure)  # type: ignore[misc]
        self.found_inf = skip                            # DeepSpeed calls once for each group
        return result
