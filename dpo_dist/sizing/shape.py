"""A model's size from config.json alone: parameters, FLOPs, and what is kept of a token for backward. No torch here.

Counted from the architecture's published definition; tests hold the counts against the real model's parameters, against
models/cost.py, and against the tensors that autograd really saves.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist.config.adapter import Adapter
from dpo_dist.config.errors import UserError, nearest, one_line
from dpo_dist.config.safetensors_header import read_header
from dpo_dist.config.schema import LoraConfig
from dpo_dist.runtime.json_files import needed_object
from dpo_dist.sizing.flops import Flops


@dataclass(frozen=True)
class _Family:
    """Where an architecture differs from Llama."""

    norms: int = 2                       # of a layer, over the hidden size
    post_norms: int = 0                  # those of them whose output no matrix reads
    layer_norm: bool = False             # LayerNorm with bias instead of RMSNorm
    wide_norm: bool = False              # the norm's weight is multiplied in fp32
    llamas_norm: bool = True             # but for its dtype, the norm computes what Llama's does
    head_norms: bool = False             # q and k are normalized, head by head
    joint_norms: bool = False            # q and k are normalized, over all heads together
    qkv_bias: bool = False
    gated: bool = True                   # MLP of three matrices; otherwise two, with biases
    eager: bool = False                  # attention by written-out scores (a soft cap)
    tied: bool = False                   # where config.json does not say
    head_dim: int | None = None          # where config.json does not say; None = hidden size / heads
    # which layers have the window: "where named" (by layer_types), "all", "every other", "where used" (a switch)
    sliding: str = "where named"


FAMILIES = {
    "llama": _Family(), "mistral": _Family(sliding="all"), "mixtral": _Family(sliding="all"),
    "qwen2": _Family(qkv_bias=True, sliding="where used"),
    "qwen3": _Family(head_norms=True, head_dim=128, sliding="where used"),
    "gemma2": _Family(norms=4, post_norms=2, wide_norm=True, llamas_norm=False, eager=True, tied=True, head_dim=256,
                      sliding="every other"),
    "gemma3_text": _Family(norms=4, post_norms=2, wide_norm=True, llamas_norm=False, head_norms=True, tied=True,
                           head_dim=256),
    "olmo3": _Family(wide_norm=True, joint_norms=True),
    "smollm3": _Family(tied=True),
    "gpt2": _Family(layer_norm=True, llamas_norm=False, gated=False, tied=True),
}


# of which config.json must hold one name each
NEEDED = (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"),
          ("vocab_size",))
# what is a whole number above 0, where config.json has it
COUNTS = (*(name for names in NEEDED for name in names), "head_dim", "num_key_value_heads", "intermediate_size",
          "n_inner", "num_local_experts", "num_experts", "num_experts_per_tok", "n_positions", "sliding_window",
          "max_window_layers")


@dataclass(frozen=True)
class ModelShape:
    """Counts of elements (not bytes). A rank that shards holds its share of them."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    query_width: int                     # heads x head_dim
    key_width: int                       # key-value heads x head_dim
    intermediate: int                    # of one expert
    experts: int
    visited_experts: int                 # that a token goes through
    layer: int                           # parameters of a layer
    layer_matrices: int                  # those of them in matrices; the others are norms and biases
    embedding: int                       # token (and position) embeddings
    head: int                            # the output head's, also where it is the embedding
    tied: bool
    largest: int                         # parameters of the largest single tensor
    # (in, out) of each linear layer of a block: where LoRA puts its adapters
    linear_sides: tuple[tuple[int, int], ...]
    flops: Flops                         # of a forward
    final_norm: int
    family: _Family
    frozen: int = 0                      # of a text-and-image model: parameters beside the language model's
    adapter: int = 0                     # of the adapter that training goes on with
    adapter_saves: tuple[str, ...] = ()  # modules that it trains whole

    @property
    def parameters(self) -> int:
        """Of the language model."""
        return self.layers * self.layer + self.embedding + self.final_norm + (0 if self.tied else self.head)

    @property
    def four_bit_parameters(self) -> int:
        """Those that model.quantization=nf4 quantizes: of the layers' linear layers."""
        return self.layers * sum(a * b for a, b in self.linear_sides)

    @property
    def largest_linear(self) -> int:
        """Parameters of the largest of them."""
        return max(a * b for a, b in self.linear_sides)

    def lora_parameters(self, rank: int) -> int:
        """Of adapters on every linear layer: A and B (arXiv 2106.09685)."""
        return self.layers * rank * sum(a + b for a, b in self.linear_sides)

    def trained_parameters(self, lora: LoraConfig) -> int:
        """Of what is updated: everything, or adapters and what is trained whole beside them."""
        if self.adapter or not lora.rank:
            return self.adapter or self.parameters
        magnitudes = self.layers * sum(outputs for _, outputs in self.linear_sides) if lora.dora else 0
        embedding = self.embedding if set(lora.modules_to_save) & {"embed_tokens", "wte"} else 0
        return self.lora_parameters(lora.rank) + magnitudes + embedding + (self.head if self.trains_head(lora) else 0)

    def freezes_base(self, lora: LoraConfig) -> bool:
        return bool(self.adapter or lora.rank)

    def trains_head(self, lora: LoraConfig) -> bool:
        return not self.freezes_base(lora) or "lm_head" in (*lora.modules_to_save, *self.adapter_saves)

    def saved_bytes_per_token(self, width: int, keys_per_token: float, scores_per_token: float, pieces: int,
                              fused: bool = False, recompute: bool = False) -> float:
        """Bytes that one layer keeps for backward, for each token.

        width: bytes of an activation (2 or 4). keys_per_token: keys laid out for attention, over tokens (a prompt's
        keys stand before each of its completions). scores_per_token: elements of a mask (or of a head's scores), over
        tokens. pieces: copies of attention's output (2 where it is computed branch by branch and put together). fused:
        by models/fused.py. recompute: without norms, rotary embedding and activation, which backward computes again;
        then the other figures do not count.
        """
        if recompute:
            return self._kept_beside_cheap_parts(width)
        f, h, q, kv = self.family, self.hidden, self.query_width, self.key_width
        fused = fused and f.llamas_norm                                 # as models/fused.py finds out
        if f.layer_norm:
            norms, fp32 = 2.0 * f.norms * h, 2.0 * f.norms              # input and output; mean and deviation
        elif fused:
            norms, fp32 = 2.0 * f.norms * h, float(f.norms)             # input and output; the root mean square
        elif width == 4:                                 # the same as below, where the input is in fp32 anyway
            norms, fp32 = f.norms * 3.0 * h - f.post_norms * h, float(f.norms)
        else:                                            # input in fp32, normalized, output; the root mean square
            wide = (2 if f.wide_norm else 1) * h
            norms = f.norms * (2.0 * h + h - wide) - f.post_norms * h
            fp32 = f.norms * (wide + 1.0)
        if f.head_norms or f.joint_norms:
            # the input in fp32, the normalized (in fp32 too where it is multiplied so), the root mean squares
            wide = q + kv if f.wide_norm and width == 2 and not fused else 0
            roots = 2.0 if f.joint_norms else (q + kv) * self.heads / q
            norms, fp32 = norms + (q + kv) - wide, fp32 + wide + (0 if fused else q + kv) + roots
        keys = 2.0 * keys_per_token * (q if f.eager else kv)
        # GPT-2's are a view of one product with keys and values
        queries = 3.0 * h if not f.gated else q
        attention = queries + keys + q * (1 if f.eager else pieces)
        if f.eager:
            attention += 2.0 * self.heads * scores_per_token            # bounded scores, probabilities
            fp32 += self.heads * scores_per_token if width == 2 else 0  # the softmax before it is narrowed
        else:
            fp32 += self.heads                                          # the softmax's normalizer
            attention += scores_per_token
        return width * (norms + attention + self._mlp_saved(fused)) + 4.0 * fp32

    def _mlp_saved(self, fused: bool) -> float:
        if not self.family.gated:
            # GELU written out: x, x/2, tanh, 1 + tanh, product
            return 5.0 * self.intermediate
        if self.experts == 1:
            return (3.0 if fused else 4.0) * self.intermediate          # gate, up, silu(gate) unless fused, product
        return self.visited_experts * (2.0 * self.hidden + 4.0 * self.intermediate)

    def _kept_beside_cheap_parts(self, width: int) -> float:
        """The layer's input and what checkpointing.py keeps: outputs of products and of attention (unless eager)."""
        f, h, q, kv = self.family, self.hidden, self.query_width, self.key_width
        mlp = self.visited_experts * ((2.0 if f.gated else 1.0) * self.intermediate + h)
        attention = (0.0 if f.eager else q) + q + 2.0 * kv + h
        return width * (h + attention + mlp) + (0.0 if f.eager else 4.0 * self.heads)

    def forward_workspace_bytes_per_token(self, width: int) -> float:
        """Bytes in use at once while a layer that keeps nothing goes forward: four of the MLP, and two streams."""
        return width * (4.0 * self.intermediate * min(self.visited_experts, self.experts) + 2.0 * self.hidden)

    def training_workspace_bytes_per_token(self, width: int) -> float:
        """Bytes of activation gradients in use at once in a layer's backward: three of the MLP, and two streams."""
        return width * (3.0 * self.intermediate * min(self.visited_experts, self.experts) + 2.0 * self.hidden)


def read_shape(folder: Path, adapter: Adapter | None = None) -> ModelShape:
    """The shape that a model's folder describes, with the adapter that is trained on it. UserError where it has no
    config.json."""
    if adapter is not None:
        return replace(read_shape(folder), adapter=adapter.elements, adapter_saves=adapter.modules_to_save)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={folder} has no config.json, from which sizes are predicted; give a folder that "
                        "has one")
    config = needed_object(folder / "config.json", "copy the model again")
    shape = model_shape(config)
    more = stored_elements(folder) - shape.parameters
    if "text_config" in config:
        return replace(shape, frozen=max(0, more))
    # a head that config.json denies: the files hold, as in models/folder.py
    return replace(shape, tied=False) if shape.tied and more == shape.head else shape


def stored_elements(folder: Path) -> int:
    """Elements of all tensors in a model's weight files, by their headers; 0 where there are none."""
    return sum(math.prod(entry["shape"]) for file in folder.glob("model*.safetensors")
               for entry in read_header(file)[1].values())


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; of a text-and-image model, that of its language model. UserError for an
    architecture whose sizes are not known here."""
    tied = config.get("tie_word_embeddings")
    config = config.get("text_config") or config
    if not isinstance(config, Mapping):
        raise UserError(f"config.json has text_config={config!r}, which is no object; copy the model again")
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"config.json has model_type={kind}, whose sizes cannot be predicted: "
                        f"{nearest(kind, FAMILIES)}")
    if missing := [key for key in NEEDED if not any(config.get(name) for name in key)]:
        raise UserError(f"config.json does not say {missing[0][0]}, without which sizes cannot be predicted")
    family = FAMILIES[kind]

    for name in COUNTS:
        value = config.get(name)
        most = 10_000 if "layer" in name else 2**31
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise UserError(f"config.json has {name}={one_line(repr(value))}, which must be a whole number from 1 to "
                            f"{most:,}; copy the model again")

    def get(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    h, layers = get("hidden_size", "n_embd"), get("num_hidden_layers", "n_layer")
    heads = get("num_attention_heads", "n_head")
    head_dim = get("head_dim", default=family.head_dim or h // heads)
    key_heads = get("num_key_value_heads", default=8 if kind in ("mistral", "mixtral") else heads)
    q, kv = heads * head_dim, key_heads * head_dim
    inner = get("intermediate_size", "n_inner", default=4 * h)
    experts = get("num_local_experts", "num_experts", default=1)
    visited = get("num_experts_per_tok", default=experts)
    vocabulary = config["vocab_size"]
    tied = bool(get("tie_word_embeddings", default=family.tied) if tied is None else tied)

    all_biased = kind == "gpt2" or get("attention_bias")
    biases = (q + 2 * kv if family.qkv_bias or all_biased else 0) + (h if all_biased else 0)
    attention_matrices = 2 * h * q + 2 * h * kv
    normalized = q + kv if family.joint_norms else 2 * head_dim if family.head_norms else 0
    attention = attention_matrices + biases + normalized
    matrices = 3 if family.gated else 2
    mlp_bias = (matrices - 1) * inner + h if kind == "gpt2" or get("mlp_bias") else 0
    router = experts * h if experts > 1 else 0
    mlp = experts * matrices * h * inner + mlp_bias + router
    norm = 2 * h if family.layer_norm else h
    head = vocabulary * h
    positions = get("n_positions", default=1024) * h if kind == "gpt2" else 0
    qkv = [(h, q + 2 * kv)] if kind == "gpt2" else [(h, q), (h, kv), (h, kv)]
    mlp_sides = [(h, inner)] * (matrices - 1) + [(inner, h)] if experts == 1 else []

    per_token = 2.0 * layers * (attention_matrices + matrices * h * inner * visited + router)
    spans = Counter(_windows(config, family, layers))
    flops = Flops(per_token, 2.0 * head, tuple((4.0 * q * n, window) for window, n in spans.items()))
    mlp_tensor = experts * (matrices - 1) * h * inner if experts > 1 else h * inner
    return ModelShape(
        model_type=kind, hidden=h, layers=layers, heads=heads, vocabulary=vocabulary, query_width=q, key_width=kv,
        intermediate=inner, experts=experts, visited_experts=visited, layer=attention + mlp + family.norms * norm,
        layer_matrices=attention_matrices + experts * matrices * h * inner + router,
        embedding=head + positions, head=head, tied=tied,
        largest=max(head, mlp_tensor, *(a * b for a, b in qkv), h * q, positions),
        linear_sides=(*qkv, (q, h), *mlp_sides), flops=flops, final_norm=norm, family=family)


def _windows(config: Mapping[str, Any], family: _Family, layers: int) -> list[int | None]:
    """The attention window of each layer, None where it has none."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    unused = family.sliding == "where used" and not config.get("use_sliding_window")
    if window is None or family.sliding == "where named" or unused:
        return [None] * layers
    if family.sliding == "every other":
        return [None if i % 2 else window for i in range(layers)]
    full = config.get("max_window_layers", layers) if family.sliding == "where used" else 0
    return [None if i < full else window for i in range(layers)]
