"""muon: for each matrix of the decoder layers, momentum made orthogonal; AdamW for embeddings, head, norms and biases.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); how large an update is, and
weight decay, as in Moonlight (arXiv 2502.16982, section 2.2). The numbers are torch.optim.Muon's, and one class updates
whole matrices as well as those that ZeRO has cut (matrix_parts.py).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.config.optimizers import MuonConfig
from dpo_dist.policy.optimizers.weights import TrainedWeights

COEFFICIENTS = 3.4445, -4.7750, 2.0315               # of the quintic: a slope at 0 as steep as it may be
SMALLEST_NORM = 1e-7

# A rank's flat part of several matrices, bf16 → the parts of what each became: (where it lies in the flat tensor, its
# values, its matrix's shape).
Orthogonalized = list[tuple[slice, Tensor, torch.Size]]
Parts = Callable[[Tensor, Callable[[Tensor], Tensor]], Orthogonalized]


class MuonAndAdamW(torch.optim.Optimizer):
    """A parameter of a group with `momentum` is a matrix, or a flat tensor of parts of matrices (`parts_of`)."""

    found_inf: Tensor | None = None

    def __init__(self, matrices: list[nn.Parameter], rest: list[nn.Parameter], optim: MuonConfig):
        self._ns_steps = optim.ns_steps
        self._adamw = torch.optim.AdamW(rest, lr=0.0, betas=optim.betas, eps=optim.eps,
                                        weight_decay=optim.weight_decay, fused=True)
        self.parts_of: Mapping[Tensor, Parts] = {}       # of flat tensors
        muon = {"params": matrices, "momentum": optim.momentum, "nesterov": optim.nesterov, "lr": 0.0,
                "weight_decay": optim.weight_decay, "adjust_lr_fn": optim.adjust_lr_fn}
        adamw = {**self._adamw.param_groups[0], "lr_ratio": optim.adamw_lr_ratio}
        super().__init__([muon, adamw], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "momentum" in group:
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, p.grad, group)
        # DeepSpeed changes the list of groups at each call, and a checkpoint the state
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.state = self.state
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        if self._adamw.param_groups:
            self._adamw.step()

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Updates a parameter of a Muon group. The gradient is used up."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum, rate = state["momentum_buffer"], torch.full((), group["lr"], dtype=torch.float64, device=p.device)
        if self.found_inf is not None:
            # the momentum stays where the gradient equals it, and the weights where the rate is 0
            torch.where(self.found_inf.bool(), momentum, gradient, out=gradient)
            rate = rate * (1 - self.found_inf)
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        parts = self.parts_of.get(p, _whole)
        p.mul_(1 - rate * group["weight_decay"])
        for where, values, shape in parts(direction.bfloat16(), lambda matrix: orthogonal(matrix, self._ns_steps)):
            p[where].sub_(values.float() * (rate * _size(group["adjust_lr_fn"], shape)))


def _whole(direction: Tensor, orthogonalize: Callable[[Tensor], Tensor]) -> Orthogonalized:
    return [(slice(None), orthogonalize(direction), direction.shape)]


def _size(adjust_lr_fn: str, shape: torch.Size) -> float:
    """What an orthogonal update of a matrix of this shape is multiplied by, besides the learning rate."""
    rows, columns = shape[-2:]
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))           # the root mean square of AdamW's updates (Moonlight, eq. 4)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """About U V^T of the matrix U S V^T, bf16, by Newton-Schulz iterations; of several matrices in a stack, each."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizer(optim: MuonConfig, weights: TrainedWeights) -> MuonAndAdamW:
    matrices = set(weights.matrices)
    return MuonAndAdamW(weights.matrices, [w for w in weights.everything if w not in matrices], optim)
