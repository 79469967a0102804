"""The learning rate as a function of the step: nothing to save, nothing to resume."""
from __future__ import annotations

import math

from dpo_dist.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of step 1 … total_steps: a linear warm-up, then constant, or down to min_lr_ratio of the peak, which a
    step after the last would have."""
    warmup = math.ceil(optim.warmup_ratio * total_steps)
    done = step - 1                                       # steps before this one
    if done < warmup:
        return optim.lr * step / warmup
    progress = (done - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "constant":
        return optim.lr
    above = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * above)
