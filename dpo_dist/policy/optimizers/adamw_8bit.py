"""adamw_8bit: bitsandbytes' AdamW, whose two moments are 8 bits each, in blocks of 256 elements with a scale (arXiv
2110.02861).

Embeddings keep moments of 32 bits, as its authors advise (section 2.3), and so do norms, biases and whatever is smaller
than 4,096 elements. Under ZeRO 1 to 3 blocks are cut in a rank's part of all tensors laid end to end: where a tensor is
no multiple of 256 elements, the numbers are those of one process to the rounding of 8 bits.
"""
from __future__ import annotations

from typing import Any

from torch import nn

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import OptimConfig
from dpo_dist.policy.optimizers.weights import TrainedWeights
from dpo_dist.policy.skip import SkipsOnHost

try:
    import bitsandbytes
except ImportError as error:
    raise UserError("optim.name=adamw_8bit needs bitsandbytes, which is not installed; pip install "
                    "'dpo-dist[adamw_8bit]', or set optim=adamw") from error

SMALLEST = 4096                            # elements of a tensor whose moments are 8 bits


class AdamW8bit(SkipsOnHost, bitsandbytes.optim.AdamW8bit):
    """How many bits is a parameter group's own key: DeepSpeed puts one flat tensor in place of a group's weights."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        return {**super().get_config(gindex, pindex, group), "optim_bits": group["bits"]}


def make_optimizer(optim: OptimConfig, weights: TrainedWeights) -> AdamW8bit:
    embeddings = set(weights.embeddings)

    def bits(weight: nn.Parameter) -> int:
        return 32 if weight in embeddings or weights.shapes[weight].numel() < SMALLEST else 8

    groups = [{"params": [w for w in weights.everything if bits(w) == wanted], "bits": wanted} for wanted in (8, 32)]
    return AdamW8bit([group for group in groups if group["params"]], lr=0.0, betas=optim.betas, eps=optim.eps,
                     weight_decay=optim.weight_decay, min_8bit_size=0)
