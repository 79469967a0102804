"""fp32 master weights beside bf16 weights, for one process without DeepSpeed: small updates must not be rounded away.

The same recipe as DeepSpeed's: forward and backward in bf16, gradients added up in fp32 over the micro-steps, AdamW in
fp32, and the weights rounded once a step (mixed precision training, arXiv 1710.03740, section 3.1).
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MasterWeights:
    """fp32 copies of the trained parameters that are bf16 or fp16; of others, the parameters themselves."""

    def __init__(self, trained: Iterable[nn.Parameter]):
        weights = list(trained)
        self.parameters = [nn.Parameter(p.detach().float()) if p.dtype in (torch.bfloat16, torch.float16) else p
                           for p in weights]
        both = zip(weights, self.parameters, strict=True)
        self._pairs = [(weight, master) for weight, master in both if weight is not master]
        for weight, master in self._pairs:
            weight.register_post_accumulate_grad_hook(lambda weight, master=master: _move_gradient(weight, master))

    def publish(self) -> None:
        """Rounds the masters into the weights, after an update."""
        if self._pairs:
            with torch.no_grad():
                torch._foreach_copy_([weight for weight, _ in self._pairs], [master for _, master in self._pairs])


def _move_gradient(weight: nn.Parameter, master: nn.Parameter) -> None:
    """The gradient of one backward, as soon as it is whole, is added to the master's."""
    assert weight.grad is not None, "the hook runs when the gradient is there"
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None
