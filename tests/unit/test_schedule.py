"""The learning rate is a function of the step."""
from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

from dpo_dist.config.schema import OptimConfig
from dpo_dist.run.schedule import learning_rate

BASE = OptimConfig(name="adamw", lr=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, schedule="constant",
                   warmup_ratio=0.0, min_lr_ratio=0.0, max_grad_norm=None)


def rates(schedule: str, warmup_ratio: float, total: int, min_lr_ratio: float = 0.0) -> list[float]:
    optim = dataclasses.replace(BASE, schedule=schedule, warmup_ratio=warmup_ratio,      # type: ignore[arg-type]
                                min_lr_ratio=min_lr_ratio)
    return [learning_rate(optim, step, total) for step in range(1, total + 1)]


def test_constant_without_warm_up_is_the_peak_at_every_step():
    assert rates("constant", 0.0, 5) == [1.0] * 5


def test_warm_up_rises_to_the_peak_in_its_share_of_the_steps():
    assert rates("constant", 0.4, 10) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_linear_and_cosine_fall_from_the_peak_towards_0_after_the_last_step():
    assert rates("linear", 0.2, 10)[2:] == pytest.approx([1 - i / 8 for i in range(8)])
    cosine = rates("cosine", 0.0, 100)
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and cosine[-1] < 1e-3
    assert all(a > b for a, b in pairwise(cosine))


def test_a_run_of_one_step_of_pure_warm_up_still_learns():
    assert rates("linear", 1.0, 1) == [1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_fall_to_min_lr_ratio_is_transformers_and_warm_up_is_one_step_ahead_of_it(schedule: str):
    """transformers makes the first step with a learning rate of 0; here it is that of its second step."""
    total, warmup = 50, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = (get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=0.1)
              if schedule == "cosine" else
              get_polynomial_decay_schedule_with_warmup(optimizer, warmup, total, lr_end=0.1, power=1.0))
    wanted = []
    for _ in range(total + 1):
        wanted += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    ours = rates(schedule, warmup / total, total, min_lr_ratio=0.1)
    assert ours[warmup:] == pytest.approx(wanted[warmup:total], rel=1e-12)
    assert ours[:warmup] == pytest.approx(wanted[1:warmup + 1], rel=1e-12)
    assert wanted[total] == pytest.approx(0.1), "the end that the last step comes near"
