"""Memory a rank, step time and communication, predicted from config and config.json before a job is queued. No torch here.

Every figure is a sum of named terms (Memory, StepTime), each written from what the code and DeepSpeed 0.19 allocate; nothing is fitted.
What a device is assumed to do stands in Device. The CPU's terms were measured (benchmarks/sizing.py), the GPU's were not.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from dpo_dist.config import RunConfig
from dpo_dist.shape import ModelShape

GIB = 2**30
LOGITS_AT_ONCE, NARROWEST_BLOCK = 2**24, 256     # as in logps.py, which imports torch; a test holds them together
BUCKET = 500_000_000                             # DeepSpeed's reduce buckets, elements
LIVE = 1_000_000_000                             # stage3_max_live_parameters: gathered elements that may stay until backward needs them
PREFETCH = 50_000_000                            # stage3_prefetch_bucket_size, elements
MODULES_OF_A_LAYER = 13                          # that ZeRO-3 hooks: of Llama's seven linear layers, two norms, and what holds them


@dataclass(frozen=True)
class Device:
    """What one rank runs on, and what is assumed of it."""

    name: str
    measured: bool
    memory: float                    # bytes a rank may hold
    host_memory: float               # bytes of the node's CPU memory that a rank may use, for offloading
    framework: float                 # bytes that libraries take at first use, beside the model: contexts, workspaces, communicators
    flops: float                     # a second, the matrix units' peak
    efficiency: float                # share of that peak which a step's matrix products reach
    bandwidth: float                 # bytes a second of the rank's memory, for the optimizer's pass over its state
    host_bandwidth: float            # the same of the CPU memory that offloading uses, for one rank's share of the host
    link: float                      # bytes a second that a rank sends, and receives, in a collective inside a node
    node_link: float                 # the same across nodes
    latency: float                   # seconds a collective takes however little it moves
    overlaps: bool                   # communication behind computation
    whole_buckets: bool              # a buffer costs what is asked for (GPU), not what is touched (CPU)
    pieces: int                      # copies of attention's output that are kept; 2 where branches are computed in turn and joined
    masks: bool                      # attention over a branch keeps its mask
    flat_copies: int                 # of a bucket in ZeRO-3's reduce-scatter: interleaved by rank, and gloo's own
    sharded_share: float             # of link, which is an all-reduce's: what ZeRO-3's gathers and scatters reach, copies among them
    hook: float                      # seconds of Python that ZeRO-3 adds to a module's pass, where nothing hides it


CPU = Device(
    "CPU core", measured=True, memory=math.inf, host_memory=math.inf, framework=24e6, flops=1.0e11, efficiency=0.75, bandwidth=5e9,
    host_bandwidth=5e9, link=1e9, node_link=1e9, latency=3e-4, overlaps=False, whole_buckets=False, pieces=2, masks=True, flat_copies=2,
    sharded_share=0.25, hook=3e-4)
GPU_80GB = Device(
    "GPU of 80 GB", measured=False, memory=80e9, host_memory=200e9, framework=4e9, flops=989e12, efficiency=0.40, bandwidth=2.5e12,
    host_bandwidth=20e9, link=300e9, node_link=40e9, latency=3e-5, overlaps=True, whole_buckets=True, pieces=1, masks=False, flat_copies=1,
    sharded_share=1.0, hook=0.0)


@dataclass(frozen=True)
class World:
    """Ranks, and the device that each has."""

    nodes: int
    ranks: int
    device: Device

    @property
    def link(self) -> float:
        return self.device.link if self.nodes == 1 else self.device.node_link


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a pair, how many pairs there are (None: not known), and where that is from."""

    prompt: float
    chosen: float
    rejected: float
    pairs: int | None
    source: str

    @property
    def pair(self) -> float:
        return self.prompt + self.chosen + self.rejected

    @property
    def seen_keys(self) -> float:
        """Keys laid out for attention: a prompt's stand before each of its completions again."""
        return 3 * self.prompt + self.chosen + self.rejected

    def mask(self, whole: bool) -> float:
        """Queries x keys of a pair's completions, and of its prompt where scores are written out (`whole`)."""
        branches = sum(c * (self.prompt + c) for c in (self.chosen, self.rejected))
        return branches + (self.prompt**2 if whole else 0)


def worst_lengths(max_length: int) -> Lengths:
    """Half of data.max_length for the prompt, the other half for each completion: the most tokens that pairs of even parts have."""
    half = max_length / 2
    return Lengths(half, half, half, None, f"worst case: every pair as long as data.max_length={max_length} allows, half of it prompt")


@dataclass(frozen=True)
class Packs:
    """What a rank forwards at once, and how often in a step."""

    tokens: float
    micro_steps: int
    completion_share: float          # of the tokens: those that the head sees

    @classmethod
    def of(cls, config: RunConfig, lengths: Lengths, ranks: int) -> Packs:
        a_rank = math.ceil(config.train.pairs_per_step / ranks) * lengths.pair
        room = max(1, config.train.tokens_per_microbatch // lengths.pair) * lengths.pair      # whole pairs alone fit into a pack
        steps = max(1, math.ceil(a_rank / room))
        return cls(a_rank / steps, steps, (lengths.chosen + lengths.rejected) / lengths.pair)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by what they are for. Not all of it is there at once: see `moments`."""

    framework: float
    weights: float                   # in model.dtype, this rank's part
    master_weights: float            # DeepSpeed's fp32 copy, also where model.dtype is fp32
    optimizer: float                 # AdamW's two moments, fp32
    gradients: float                 # held from one micro-step to the next (ZeRO-3: always)
    buckets: float                   # buffers for reductions that stay
    gathered: float                  # ZeRO-3: weights made whole: as many as may stay, at least the largest
    in_flight: float                 # ZeRO-3: what an all-gather brought, rank by rank, until the last weight of it was asked for
    activations: float               # what forward keeps for backward; with checkpointing the layers' inputs alone
    recomputed: float                # with checkpointing: one layer's activations, made again
    workspace: float                 # gradients of activations inside one layer
    head: float                      # blocks of logits and what goes with them, while the head computes
    head_gradient: float             # of the head's weight: there while the last layer goes backward
    reduction: float                 # gradients that are not held, and their copies, when backward ends
    update: float                    # flat copies of gradients while the optimizer steps
    reference: float                 # a live reference beside the policy
    host: float                      # CPU memory that offloading takes, for this rank; not part of the device's

    @property
    def moments(self) -> dict[str, float]:
        """{moment: bytes} of the five that may be the peak. Whole weights go when backward is through with them."""
        always = self.framework + self.weights + self.master_weights + self.optimizer + self.gradients + self.buckets + self.reference
        passing = always + self.gathered + self.activations
        return {"the last layer goes forward": passing + self.in_flight, "the head computes": passing + self.head,
                "the last layer goes backward": passing + self.recomputed + self.workspace + self.head_gradient,
                "gradients are reduced": always + self.reduction, "the optimizer steps": always + self.update}

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    def fits(self, device: Device) -> bool:
        return self.peak <= device.memory and self.host <= device.host_memory


def memory(config: RunConfig, shape: ModelShape, lengths: Lengths, world: World) -> Memory:
    """The terms of a training rank's memory."""
    width, ranks, stage, device = dtype_bytes(config, world.device), world.ranks, config.zero.stage, world.device
    packs = Packs.of(config, lengths, ranks)
    trained = shape.lora_parameters(config.model.lora.rank) if config.model.lora.rank else shape.parameters
    everything = shape.parameters + (trained if config.model.lora.rank else 0)
    again = packs.micro_steps > 1
    bucket = width * (BUCKET if device.whole_buckets else min(trained, BUCKET))
    terms = dict.fromkeys((f.name for f in fields(Memory)), 0.0)
    terms |= _model_terms(stage, width, everything, trained, ranks, shape.largest, again, bucket, device)
    if config.zero.offload_optimizer == "cpu":                           # the pass over the optimizer's state is done there
        terms["host"] += terms["master_weights"] + terms["optimizer"] + 4.0 * trained / ranks
        terms |= {"master_weights": 0.0, "optimizer": 0.0, "gradients": 0.0, "update": 0.0}
    if config.zero.offload_parameters == "cpu":
        terms["host"] += terms["weights"]
        terms["weights"] = 0.0
    terms |= _pack_terms(config, shape, lengths, packs, width, device)
    if config.loss.needs_reference and config.reference.mode == "live" and config.reference.engine != "adapter_off":
        terms["reference"] = reference_weights(config, shape, world)
    if device is CPU or not math.isfinite(device.memory):                # offloading moves nothing where there is one kind of memory
        terms["framework"] += terms["host"]
    return Memory(**{**terms, "framework": terms["framework"] + device.framework})


def _model_terms(stage: int | None, width: int, everything: float, trained: float, ranks: int, largest: int, again: bool,
                 bucket: float, device: Device) -> dict[str, float]:
    """Terms that depend on the parameters alone: one case for each ZeRO stage."""
    part = trained / ranks
    if stage is None or stage == 0:
        copy = 0.0 if stage is None else width * min(trained, BUCKET)    # all-reduced in a flat copy
        held = 4.0 * trained if again else 0.0
        return {"weights": width * everything, "optimizer": 8.0 * trained, "gradients": held,
                "reduction": 4.0 * trained - held + copy, "update": 4.0 * trained - held}
    if stage in (1, 2):
        held = 4.0 * (trained if stage == 1 else part) if again else 0.0
        staged = 2 * bucket                  # the bucket and its all-reduced copy on a CPU; two buckets in turn on a GPU
        return {"weights": width * everything, "master_weights": 4.0 * part, "optimizer": 8.0 * part, "gradients": held,
                "buckets": staged if device.whole_buckets else 0.0, "reduction": (0.0 if device.whole_buckets else staged),
                "update": 8.0 * part - min(held, 4.0 * part)}
    gathered = width * min(everything, max(LIVE + PREFETCH, largest)) if ranks > 1 else 0.0      # one rank's part is the whole
    return {"weights": width * everything / ranks, "master_weights": 4.0 * part, "optimizer": 8.0 * part, "gradients": 4.0 * part,
            "buckets": bucket, "gathered": gathered, "in_flight": min(gathered, float(width * max(PREFETCH, largest))), "update": 4.0 * part,
            "reduction": device.flat_copies * width * min(trained, max(BUCKET, largest))}        # a larger tensor goes alone


def _pack_terms(config: RunConfig, shape: ModelShape, lengths: Lengths, packs: Packs, width: int, device: Device) -> dict[str, float]:
    """Terms that depend on the tokens of a pack."""
    scores = lengths.mask(shape.family.eager) if device.masks or shape.family.eager else 0.0
    layer = packs.tokens * shape.saved_bytes_per_token(width, lengths.seen_keys / lengths.pair, scores / lengths.pair, device.pieces)
    stream = packs.tokens * width * shape.hidden
    checkpointing = config.model.gradient_checkpointing
    rows = packs.tokens * packs.completion_share
    block = min(rows * shape.vocabulary, max(LOGITS_AT_ONCE, NARROWEST_BLOCK * rows))
    narrow = width if width == 2 else 0                                  # a block as the product gave it, beside the one in fp32
    head_gradient = 0.0 if config.model.lora.rank else float(width * shape.head)
    in_forward = (8.0 + narrow) * block                                  # logits and their exponentials
    in_backward = (4.0 + narrow) * block + head_gradient + rows * shape.hidden * 4.0
    return {"activations": shape.layers * (stream if checkpointing else layer) + 3 * stream, "recomputed": layer if checkpointing else 0.0,
            "workspace": packs.tokens * shape.training_workspace_bytes_per_token(width),
            "head": max(in_forward, in_backward) + rows * shape.hidden * width, "head_gradient": head_gradient}


def dtype_bytes(config: RunConfig, device: Device) -> int:
    """Bytes of a weight or an activation: model.dtype, where auto is bf16 on a GPU and fp32 on a CPU."""
    return 4 if config.model.dtype == "fp32" or (config.model.dtype == "auto" and not device.overlaps) else 2


def scoring_memory(config: RunConfig, shape: ModelShape, lengths: Lengths, world: World) -> float:
    """Bytes of a rank that scores the reference: weights, one layer's work, logits. Those of servers (vllm) are not counted."""
    width = dtype_bytes(config, world.device)
    tokens = config.train.tokens_per_microbatch
    gathered = width * (min(shape.parameters, LIVE + PREFETCH) + min(shape.parameters, PREFETCH)) if config.reference.engine == "zero" else 0.0
    weights = reference_weights(config, shape, world)
    layer = tokens * shape.training_workspace_bytes_per_token(width) + 4 * tokens * width * shape.hidden
    return world.device.framework + weights + gathered + layer + 8.0 * LOGITS_AT_ONCE


def reference_weights(config: RunConfig, shape: ModelShape, world: World) -> float:
    """Bytes of the reference's weights on a rank; with adapter_off those that it shares with the policy."""
    r, whole = config.reference, float(dtype_bytes(config, world.device) * shape.parameters)
    if r.engine == "vllm" or r.offload == "cpu":
        return 0.0
    if r.offload == "disk":                              # one piece at a time
        return whole * max(shape.layer, shape.embedding, shape.head) / shape.parameters
    if r.engine == "tensor_parallel":
        return whole / (r.tensor_parallel_size or world.ranks // world.nodes)
    sharded = r.engine == "zero" or (r.engine == "adapter_off" and config.zero.stage == 3)
    return whole / (world.ranks if sharded else 1)


# -------------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go to; bytes that a rank sends in it."""

    compute: float
    hooks: float                     # ZeRO-3's Python around each module, where kernels do not hide it
    communication: float
    update: float
    sent: float
    overlaps: bool

    @property
    def seconds(self) -> float:
        """As if communication hid behind computation wherever the device can do that: the least that a step takes."""
        together = max(self.compute, self.communication) if self.overlaps else self.compute + self.communication
        return together + self.hooks + self.update


def step_time(config: RunConfig, shape: ModelShape, lengths: Lengths, world: World) -> StepTime:
    """The terms of a step's time."""
    device, ranks = world.device, world.ranks
    packs = Packs.of(config, lengths, ranks)
    frozen = config.model.lora.rank > 0
    flops = pair_flops(shape, lengths, frozen, config.model.gradient_checkpointing) * config.train.pairs_per_step
    rate = (config.cluster.peak_tflops * 1e12 if config.cluster.peak_tflops else device.flops) * device.efficiency
    trained = shape.lora_parameters(config.model.lora.rank) if frozen else shape.parameters
    sent, collectives = traffic(config, shape, world, packs.micro_steps, trained)
    link, hooks = world.link, 0.0
    if config.zero.stage == 3:
        passes = 3 if config.model.gradient_checkpointing else 2
        link, hooks = link * device.sharded_share, device.hook * passes * packs.micro_steps * MODULES_OF_A_LAYER * shape.layers
    touched = 28.0 * trained / (1 if config.zero.stage in (None, 0) else ranks)          # AdamW reads 16 and writes 12 bytes an element
    bandwidth = device.host_bandwidth if config.zero.offload_optimizer == "cpu" else device.bandwidth
    return StepTime(flops / (ranks * rate), hooks, sent / link + collectives * device.latency, touched / bandwidth, sent, device.overlaps)


def pair_flops(shape: ModelShape, lengths: Lengths, frozen: bool, checkpointing: bool) -> float:
    """FLOPs of a pair of mean length, there and back; with checkpointing the layers' forward once more."""
    whole = np.array([[lengths.prompt, lengths.chosen, lengths.rejected]]).round().astype(np.int64)
    forward = sum(float(part.sum()) for part in shape.flops.of_pairs(whole))
    total = sum(float(part.sum()) for part in shape.flops.training(frozen).of_pairs(whole))
    head = shape.flops.per_completion_token * float(whole[0, 1:].sum())
    return total + (forward - head if checkpointing else 0.0)


def traffic(config: RunConfig, shape: ModelShape, world: World, micro_steps: int, trained: float) -> tuple[float, int]:
    """(bytes that a rank sends in a step, collectives): rings, in which each of w ranks sends (w - 1) / w of what is gathered or
    scattered, and twice that of what is all-reduced."""
    stage, width, w = config.zero.stage, dtype_bytes(config, world.device), world.ranks
    around = (w - 1) / w
    if stage is None or w == 1:
        return 0.0, 0
    gradients = width * trained * around
    buckets = math.ceil(trained / BUCKET)
    if stage == 0:
        return 2 * gradients, buckets
    if stage == 1:
        return 3 * gradients, 2 * buckets
    if stage == 2:                                       # DeepSpeed all-reduces each bucket at every micro-step, then gathers the weights
        return (2 * micro_steps + 1) * gradients, (micro_steps + 1) * buckets
    if shape.parameters <= LIVE:
        gathers = 1                                      # forward's serve backward
    else:                                                # forward, backward, and where a layer does not stay from one to the other, again
        gathers = 3 if config.model.gradient_checkpointing and 2 * shape.layer > LIVE else 2
    tensors = 9 * shape.layers
    return micro_steps * (gathers * width * shape.parameters * around + gradients), micro_steps * (gathers * tensors + buckets)


def scoring_seconds(config: RunConfig, shape: ModelShape, lengths: Lengths, world: World) -> float | None:
    """Of the reference's forward over all pairs; None where their number is not known. A sharded reference is gathered once a pack."""
    if lengths.pairs is None:
        return None
    device, w = world.device, world.ranks
    compute = pair_flops(shape, lengths, False, False) / 3 * lengths.pairs / (w * device.flops * device.efficiency)
    if config.reference.engine != "zero":
        return compute
    packs = math.ceil(lengths.pairs * lengths.pair / (w * config.train.tokens_per_microbatch))
    gathering = packs * dtype_bytes(config, device) * shape.parameters * (w - 1) / w / world.link
    return max(compute, gathering) if device.overlaps else compute + gathering


def cache_bytes(lengths: Lengths) -> float | None:
    """Of the reference cache: a float32 a completion token, and 24 bytes of key and offset a sequence."""
    return None if lengths.pairs is None else lengths.pairs * (4.0 * (lengths.chosen + lengths.rejected) + 2 * 24)


def with_zero(config: RunConfig, **changes: object) -> RunConfig:
    """The config with these keys of its zero section changed."""
    return replace(config, zero=replace(config.zero, **changes))  # type: ignore[arg-type]
