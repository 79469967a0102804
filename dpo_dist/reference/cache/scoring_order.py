"""The order in which training asks for reference log-probs, as windows. The scorer works through them to stay ahead.

Within a window pairs are scored in any order, and prompts are shared. So windows are small at first, while training
waits for them, and grow later.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.sampler import Sampler

Indexes = NDArray[np.int64]

MOST_STEPS = 8                      # of a window: the first come alone, then 2, 4, 8, 8, ...
NEVER = np.iinfo(np.int64).max      # the window of a pair that training does not ask for


def windows(order: Sampler, epochs: float, max_steps: int | None, n_train: int, n_held_out: int) -> Indexes:
    """(n_train + n_held_out,) the window of each pair, training pairs first. Step 1 comes first (for the checks of step
    0), then the held-out pairs (evaluated before training), then the other steps. A pair belongs to the first window
    that asks for it."""
    window = np.full(n_train + n_held_out, NEVER)
    window[n_train:] = 1
    unasked, number, left, size = n_train, 0, 1, 1
    for step in range(1, order.total_steps(epochs, max_steps) + 1):
        pairs = np.unique(order.pairs_of_step(step, epochs, max_steps))
        fresh = pairs[window[pairs] == NEVER]
        window[fresh] = number
        unasked -= len(fresh)
        if not unasked:
            break
        left -= 1
        if not left:                                   # the next window begins
            number, size = (2, 1) if number == 0 else (number + 1, min(2 * size, MOST_STEPS))
            left = size
    return window
