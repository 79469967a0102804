"""Step time and communication, predicted from config and config.json before a job is queued. No torch here.

As in estimate.py, every figure is a sum of named terms, and nothing is fitted.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo_dist.config.schema import RunConfig
from dpo_dist.sizing.estimate import (
    LIVE,
    WHOLE_BUCKET,
    bucket_elements,
    dtype_bytes,
    optimizer_state,
    recomputed_layers,
    weight_bytes,
)
from dpo_dist.sizing.hardware import Hardware
from dpo_dist.sizing.lengths import Lengths, Packs
from dpo_dist.sizing.shape import ModelShape


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go to; bytes that a rank sends in it."""

    compute: float
    hooks: float                     # ZeRO-3's Python around each layer, where kernels do not hide it
    communication: float
    update: float
    sent: float
    overlaps: bool

    @property
    def seconds(self) -> float:
        """As if communication hid behind computation wherever the device can do that: the least that a step takes."""
        together = max(self.compute, self.communication) if self.overlaps else self.compute + self.communication
        return together + self.hooks + self.update


def step_time(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware) -> StepTime:
    """The terms of a step's time."""
    device, ranks = world.device, world.ranks
    packs = Packs.of(config, lengths, ranks)
    frozen = shape.freezes_base(config.model.lora)
    whole, cheap = recomputed_layers(config, shape.layers)
    flops = pair_flops(shape, lengths, frozen, whole / shape.layers) * config.train.pairs_per_step
    rate = (config.cluster.peak_tflops * 1e12 if config.cluster.peak_tflops else device.flops) * device.efficiency
    trained = shape.trained_parameters(config.model.lora)
    sent, collectives = traffic(config, shape, world, packs.micro_steps, trained)
    link, hooks = world.link, 0.0
    if config.zero.stage == 3:
        passes = 2 + (1 if cheap else whole / shape.layers)
        link, hooks = link * device.sharded_share, device.hook * passes * packs.micro_steps * shape.layers
    # weight and gradient are read, the weight is written; the state is read and written (AdamW: 28 bytes an element)
    sharing = 1 if config.zero.stage in (None, 0) else ranks
    touched = (12.0 * trained + 2.0 * optimizer_state(config, shape)) / sharing
    update_flops = shape.layers * config.optim.update_flops(shape.linear_sides) / sharing
    bandwidth = device.host_bandwidth if config.zero.offload_optimizer == "cpu" else device.bandwidth
    return StepTime(flops / (ranks * rate), hooks, sent / link + collectives * device.latency,
                    touched / bandwidth + update_flops / rate, sent, device.overlaps)


def pair_flops(shape: ModelShape, lengths: Lengths, frozen: bool, recomputed: float) -> float:
    """FLOPs of a pair of mean length: forward, backward, and once more the forward of that share of the layers which
    backward recomputes."""
    whole = np.array([[lengths.prompt, lengths.chosen, lengths.rejected]]).round().astype(np.int64)
    forward = sum(float(part.sum()) for part in shape.flops.of_pairs(whole))
    total = sum(float(part.sum()) for part in shape.flops.training(frozen).of_pairs(whole))
    head = shape.flops.per_completion_token * float(whole[0, 1:].sum())
    return total + recomputed * (forward - head)


def traffic(config: RunConfig, shape: ModelShape, world: Hardware, micro_steps: int,
            trained: float) -> tuple[float, int]:
    """(bytes that a rank sends in a step, collectives): rings, in which each of w ranks sends (w - 1) / w of what is
    gathered or scattered, and twice that of what is all-reduced."""
    stage, width, w = config.zero.stage, dtype_bytes(config, world.device), world.ranks
    around = (w - 1) / w
    if stage is None or w == 1:
        return 0.0, 0
    weights = width * trained * around
    gradients = (4 if config.zero.reduce_dtype == "fp32" or (stage == 1 and width == 2) else width) * trained * around
    buckets = math.ceil(trained / (WHOLE_BUCKET if stage == 0 else bucket_elements(shape.layer, world.device.overlaps)))
    if stage == 0:
        return 2 * gradients, buckets
    if stage == 1:
        return 2 * gradients + weights, 2 * buckets
    # DeepSpeed all-reduces each bucket at every micro-step, then gathers the weights
    if stage == 2:
        return 2 * micro_steps * gradients + weights, (micro_steps + 1) * buckets
    if shape.parameters <= LIVE:
        gathers = 1                                      # forward's serve backward
    else:                                                # forward, backward, and again where a layer does not stay
        again = recomputed_layers(config, shape.layers) != (0, False)
        gathers = 3 if again and 2 * shape.layer > LIVE else 2
    tensors = 9 * shape.layers
    sent = gathers * weight_bytes(config, shape, width) * around + gradients
    return micro_steps * sent, micro_steps * (gathers * tensors + buckets)


def scoring_seconds(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware) -> float | None:
    """Seconds to score all pairs; None if their number is not known. A sharded reference is gathered once a pack."""
    if lengths.pairs is None:
        return None
    device, w = world.device, world.ranks
    compute = pair_flops(shape, lengths, False, 0.0) / 3 * lengths.pairs / (w * device.flops * device.efficiency)
    if not config.reference.gathers_weights:
        return compute
    packs = math.ceil(lengths.pairs * lengths.pair / (w * config.train.tokens_per_microbatch))
    gathering = packs * dtype_bytes(config, device) * shape.parameters * (w - 1) / w / world.link
    return max(compute, gathering) if device.overlaps else compute + gathering
