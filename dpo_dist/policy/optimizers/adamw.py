"""adamw: torch's AdamW (arXiv 1711.05101), one kernel a step."""
from __future__ import annotations

import torch

from dpo_dist.config.schema import OptimConfig
from dpo_dist.policy.optimizers.weights import TrainedWeights


def make_optimizer(optim: OptimConfig, weights: TrainedWeights) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights.everything, lr=0.0, betas=optim.betas, eps=optim.eps,
                             weight_decay=optim.weight_decay, fused=True)
