"""A rank's memory, predicted from config and config.json before a job is queued (time: step_time.py). No torch here.

Every figure is a sum of named terms, each written from what the code and DeepSpeed 0.19 allocate; nothing is fitted.
What a device is assumed to do stands in hardware.py.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dpo_dist.config.schema import RunConfig
from dpo_dist.sizing.hardware import Device, Hardware
from dpo_dist.sizing.lengths import Lengths, Packs
from dpo_dist.sizing.logit_blocks import AT_ONCE, plan_blocks
from dpo_dist.sizing.shape import ModelShape

GIB = 2**30
LAYERS_IN_A_BUCKET = 2                           # one travels while the next is computed
SMALLEST_BUCKET, LARGEST_BUCKET = 50_000_000, 500_000_000        # elements
# Where nothing travels behind computation a large bucket only takes memory. Below 32 MiB, a weight more than a bucket
# included, the allocator keeps its pages (runtime/process_defaults.py).
SMALLEST_CPU_BUCKET = 4_000_000
# elements all-reduced at once where DeepSpeed has no bucket of its own (stage 0)
WHOLE_BUCKET = 500_000_000
REFERENCE_PREFETCH = 50_000_000                  # of the reference under ZeRO-3 (DeepSpeed's default), elements
# of a weight in NF4, bytes: 4 bits; of 64 a scale of 8 bits, and of 256 scales one in fp32 (models/quantized.py)
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# stage3_max_live_parameters: gathered elements that may stay until backward needs them
LIVE = 1_000_000_000


def bucket_elements(layer: int, overlaps: bool) -> int:
    """Elements that one reduction, or one gather ahead under ZeRO-3, moves at once, for layers of that many parameters.

    Large enough for the network, small enough that most of a backward is still ahead when the first one leaves.
    overlaps: whether communication goes on behind computation, as on GPUs.
    """
    smallest = SMALLEST_BUCKET if overlaps else SMALLEST_CPU_BUCKET
    return min(max(LAYERS_IN_A_BUCKET * layer, smallest), LARGEST_BUCKET)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by what they are for. Not all of it is there at once: see `moments`."""

    framework: float
    weights: float                   # in model.dtype, this rank's part
    loading: float                   # ZeRO-3 with 4-bit weights: those of the other ranks, before they are sharded
    master_weights: float            # DeepSpeed's fp32 copy, also where model.dtype is fp32
    optimizer: float                 # the optimizer's state: for AdamW two moments, fp32
    gradients: float                 # held from one micro-step to the next (ZeRO-3: always)
    buckets: float                   # buffers for reductions that stay
    gathered: float                  # ZeRO-3: weights made whole: as many as may stay, at least the largest
    # ZeRO-3: what an all-gather brought, rank by rank, until the last weight of it was asked for
    in_flight: float
    activations: float               # what forward keeps for backward; with checkpointing the layers' inputs alone
    passing: float                   # with checkpointing: what one layer holds while it goes forward
    recomputed: float                # with checkpointing: one layer's activations, made again
    dequantized: float               # the largest 4-bit weight, made whole while it multiplies
    workspace: float                 # gradients of activations inside one layer
    head: float                      # blocks of logits and what goes with them, while the head computes
    head_gradient: float             # of the head's weight: there while the last layer goes backward
    reduction: float                 # gradients that are not held, and their copies, when backward ends
    update: float                    # flat copies of gradients while the optimizer steps
    reference: float                 # a live reference beside the policy
    host: float                      # CPU memory that offloading takes, for this rank; not part of the device's

    @property
    def moments(self) -> dict[str, float]:
        """{moment: bytes} of those that may be the peak. Backward frees gathered weights when it is done with them.
        """
        always = (self.framework + self.weights + self.master_weights + self.optimizer + self.gradients + self.buckets
                  + self.reference)
        kept = always + self.gathered + self.activations
        return {"the model is loaded": self.framework + self.weights + self.loading + self.reference,
                "the last layer goes forward": kept + self.in_flight + self.passing + self.dequantized,
                "the head computes": kept + self.head,
                "the last layer goes backward": (kept + self.recomputed + self.workspace + self.dequantized
                                                 + self.head_gradient),
                "gradients are reduced": always + self.reduction, "the optimizer steps": always + self.update}

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    def fits(self, device: Device) -> bool:
        return self.peak <= device.memory and self.host <= device.host_memory


def memory(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware,
           packs: Packs | None = None) -> Memory:
    """The terms of a training rank's memory. The stage and the layers to recompute are chosen already (automatic.py).
    `packs`: what a rank forwards at once, where it is not that of mean lengths."""
    width, ranks, device = dtype_bytes(config, world.device), world.ranks, world.device
    packs = packs or Packs.of(config, lengths, ranks)
    trained = shape.trained_parameters(config.model.lora)
    adapters = trained if shape.freezes_base(config.model.lora) else 0
    whole = weight_bytes(config, shape, width) + width * (shape.frozen + adapters)
    terms = dict.fromkeys((f.name for f in fields(Memory)), 0.0)
    terms |= _model_terms(config, width, whole, trained, ranks, shape, packs.micro_steps > 1, device)
    matrices = shape.layers * shape.layer_matrices / (ranks if config.zero.stage else 1)
    terms["update"] += config.optim.update_bytes(matrices, sharded=bool(config.zero.stage))
    # the optimizer steps on the host, where its state and the gradients are
    if config.zero.offload_optimizer == "cpu":
        terms["host"] += terms["master_weights"] + terms["optimizer"] + 4.0 * trained / ranks
        terms |= {"master_weights": 0.0, "optimizer": 0.0, "gradients": 0.0, "update": 0.0}
    if config.zero.offload_parameters == "cpu":
        terms["host"] += terms["weights"]
        terms["weights"] = 0.0
    terms |= _pack_terms(config, shape, lengths, packs, width, device)
    terms["framework"] = device.framework
    if config.loss.needs_reference and config.reference.mode == "live" and not config.reference.is_policy:
        terms["reference"] = reference_weights(config, shape, world)
    # offloading moves nothing where there is one kind of memory
    if not math.isfinite(device.memory):
        terms["framework"] += terms["host"]
    return Memory(**terms)


def _model_terms(config: RunConfig, width: int, whole: float, trained: float, ranks: int, shape: ModelShape,
                 again: bool, device: Device) -> dict[str, float]:
    """Terms that depend on the parameters alone: one case for each ZeRO stage. whole: bytes of all weights."""
    stage, part, state = config.zero.stage, trained / ranks, optimizer_state(config, shape)
    size = bucket_elements(shape.layer, device.overlaps)
    travels = 4 if config.zero.reduce_dtype == "fp32" else width         # bytes of a gradient between ranks
    elements = size if device.whole_buckets else min(trained, size)      # of a bucket
    # fp32 master weights, whose gradients add up in fp32 as they come
    if stage is None and width == 2:
        return {"weights": whole, "master_weights": 4.0 * trained, "optimizer": state,
                "gradients": 4.0 * trained}
    if stage is None or stage == 0:
        copy = 0.0 if stage is None else width * min(trained, WHOLE_BUCKET)      # all-reduced in a flat copy
        held = 4.0 * trained if again else 0.0
        return {"weights": whole, "optimizer": state, "gradients": held,
                "reduction": 4.0 * trained - held + copy, "update": 4.0 * trained - held}
    # DeepSpeed's BF16_Optimizer: the whole gradient in fp32
    if stage == 1 and width == 2 and config.zero.offload_optimizer == "none":
        return {"weights": whole, "master_weights": 4.0 * part, "optimizer": state / ranks,
                "gradients": 4.0 * trained, "reduction": max(2.0 * trained, 4.0 * min(trained, WHOLE_BUCKET))}
    if stage in (1, 2):
        held = 4.0 * (trained if stage == 1 else part) if again else 0.0
        # the bucket and its all-reduced copy on a CPU; two buckets in turn on a GPU
        staged = (width + travels) * elements
        # what earlier buckets brought, in fp32
        reduced = 0.0 if again else min(4.0 * part, 4.0 * max(0.0, trained - size))
        return {"weights": whole, "master_weights": 4.0 * part, "optimizer": state / ranks, "gradients": held,
                "buckets": staged if device.whole_buckets else 0.0,
                "reduction": reduced + (0.0 if device.whole_buckets else staged),
                "update": 8.0 * part - min(held, 4.0 * part)}
    assert stage == 3, f"zero.stage={stage} is chosen before sizes are predicted"
    # one rank holds all weights anyway
    gathered = min(whole, float(width * max(LIVE + size, shape.largest))) if ranks > 1 else 0.0
    # the copy that hpZ keeps, one for each group of that many ranks
    nearby = whole / config.zero.secondary_partition if config.zero.secondary_partition else 0.0
    # 4-bit weights are sharded once they are loaded, and not their scales
    scales = (FOUR_BITS - 1 / 2) * four_bit_parameters(config, shape)
    weights = (whole - scales) / ranks + scales + nearby
    return {"weights": weights, "loading": whole - weights if scales else 0.0, "master_weights": 4.0 * part,
            "optimizer": state / ranks, "gradients": 4.0 * part, "buckets": width * elements, "gathered": gathered,
            "in_flight": min(gathered, float(width * max(size, shape.largest))), "update": 4.0 * part,
            # a larger tensor goes alone
            "reduction": device.flat_copies * travels * min(trained, max(size, shape.largest))}


def optimizer_state(config: RunConfig, shape: ModelShape) -> float:
    """Bytes of the optimizer's state, all ranks' together."""
    if shape.freezes_base(config.model.lora):
        return config.optim.state_bytes(shape.trained_parameters(config.model.lora), 0, 0, 0)
    matrices, head = shape.layers * shape.layer_matrices, 0 if shape.tied else shape.head
    vectors = shape.parameters - matrices - shape.embedding - head
    return config.optim.state_bytes(matrices, shape.embedding, head, vectors)


def _pack_terms(config: RunConfig, shape: ModelShape, lengths: Lengths, packs: Packs, width: int,
                device: Device) -> dict[str, float]:
    """Terms that depend on the tokens of a pack."""
    scores = lengths.mask(shape.family.eager) if device.masks or shape.family.eager else 0.0

    # norms, rotary embedding and SwiGLU are one kernel each, which keeps its inputs alone
    fused = config.model.kernels == "fused" or (config.model.kernels == "auto" and device.whole_buckets)

    def kept(recompute: bool) -> float:
        return packs.tokens * shape.saved_bytes_per_token(width, lengths.seen_keys / lengths.pair,
                                                          scores / lengths.pair, device.pieces, fused, recompute)

    layer, stream = kept(recompute=False), packs.tokens * width * shape.hidden
    whole, others_recompute = recomputed_layers(config, shape.layers)
    other = kept(recompute=True) if others_recompute else layer
    rows = packs.tokens * packs.completion_share
    head_gradient = float(width * shape.head) if shape.trains_head(config.model.lora) else 0.0
    logits, at_once = _logits(shape, rows, width, device)
    in_forward = logits + (width if device.whole_buckets else 8.0 + (width if width == 2 else 0)) * at_once
    in_backward = (logits + (width if device.whole_buckets else 4.0 + (width if width == 2 else 0)) * at_once
                   + head_gradient + rows * shape.hidden * 4.0)
    return {"activations": whole * stream + (shape.layers - whole) * other + 3 * stream,
            "passing": packs.tokens * shape.forward_workspace_bytes_per_token(width) if whole else 0.0,
            "recomputed": layer if whole else layer - other,
            "dequantized": float(width * shape.largest_linear) if four_bit_parameters(config, shape) else 0.0,
            "workspace": packs.tokens * shape.training_workspace_bytes_per_token(width),
            "head": max(in_forward, in_backward) + rows * shape.hidden * width, "head_gradient": head_gradient}


def _logits(shape: ModelShape, rows: float, width: int, device: Device) -> tuple[float, float]:
    """(bytes of whole logits that live from forward to backward, elements of a block that is computed and freed); one
    of them is 0. A GPU's kernels read a block as the product left it. Elsewhere there is a copy in fp32 and, in
    forward, its exponentials."""
    blocks = plan_blocks(math.ceil(rows), shape.vocabulary, width, "cuda" if device.whole_buckets else "cpu")
    if device.whole_buckets and blocks.kept == len(blocks.spans):
        return float(rows * shape.vocabulary * width), 0.0
    return 0.0, rows * min(blocks.width, shape.vocabulary)


def recomputed_layers(config: RunConfig, layers: int) -> tuple[int, bool]:
    """(layers that backward recomputes whole, whether it recomputes the cheap parts of the others), as in
    models/checkpointing.py."""
    how = config.model.gradient_checkpointing
    assert how != "auto", "model.gradient_checkpointing is chosen before sizes are predicted"
    if isinstance(how, bool):
        return (layers, False) if how else (0, False)
    return min(how, layers), True


def dtype_bytes(config: RunConfig, device: Device) -> int:
    """Bytes of a weight or an activation: model.dtype, where auto is bf16 on a GPU and fp32 on a CPU."""
    return 4 if config.model.dtype == "fp32" or (config.model.dtype == "auto" and not device.overlaps) else 2


def four_bit_parameters(config: RunConfig, shape: ModelShape) -> int:
    """How many of the policy's weights are in 4 bits."""
    return shape.four_bit_parameters if config.model.quantization == "nf4" else 0


def weight_bytes(config: RunConfig, shape: ModelShape, width: int) -> float:
    """Bytes of the policy's own weights, whole."""
    narrow = four_bit_parameters(config, shape)
    return width * (shape.parameters - narrow) + FOUR_BITS * narrow


def scoring_memory(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware) -> float:
    """Bytes of a rank that scores the reference: weights, one layer's work, logits. vLLM's servers are not counted."""
    width = dtype_bytes(config, world.device)
    tokens = config.train.tokens_per_microbatch
    gathered = 0.0
    if config.reference.gathers_weights:
        gathered = width * (min(shape.parameters, LIVE + REFERENCE_PREFETCH)
                            + min(shape.parameters, REFERENCE_PREFETCH))
    weights = reference_weights(config, shape, world)
    layer = tokens * shape.training_workspace_bytes_per_token(width) + 4 * tokens * width * shape.hidden
    logits = 8.0 * AT_ONCE["cuda" if world.device.whole_buckets else "cpu"]
    return world.device.framework + weights + gathered + layer + logits


def reference_weights(config: RunConfig, shape: ModelShape, world: Hardware) -> float:
    """Bytes of the reference's weights on a rank; with adapter_off those that it shares with the policy."""
    piece = max(shape.layer, shape.embedding, shape.head) / shape.parameters
    share = config.reference.weight_share(piece, world.nodes, world.ranks, policy_is_sharded=config.zero.stage == 3)
    width = dtype_bytes(config, world.device)
    full = config.reference_quantization == "none"
    return share * (width * shape.parameters if full else weight_bytes(config, shape, width))


def cache_bytes(lengths: Lengths) -> float | None:
    """Of the reference cache: a float32 a completion token, and 24 bytes of key and offset a sequence."""
    return None if lengths.pairs is None else lengths.pairs * (4.0 * (lengths.chosen + lengths.rejected) + 2 * 24)
