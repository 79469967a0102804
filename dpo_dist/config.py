"""RunConfig: everything a run is told, as one frozen, validated tree. No torch here, so that help and errors are instant.

Defaults live in conf/*.yaml (one commented line a key); this file holds types, allowed values and the rules between keys.
"""
from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_dist.loss_options import LOSS_OPTIONS, MIXTURE


class UserError(ValueError):
    """A mistake that a person can mend. Its message names key, value and remedy; every command ends with exit code 2."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float | None
    target_modules: tuple[str, ...] | str


@dataclass(frozen=True)
class ModelConfig:
    path: str
    dtype: Literal["auto", "fp32", "bf16"]
    attention: Literal["auto", "branch", "padded"]
    gradient_checkpointing: bool
    lora: LoraConfig


@dataclass(frozen=True)
class DatasetConfig:
    path: str
    format: Literal["auto", "preference", "messages", "sharegpt", "hh", "ratings", "token_ids"] = "auto"
    weight: float = 1.0
    name: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class DataConfig:
    train: tuple[DatasetConfig, ...]
    eval: tuple[DatasetConfig, ...]
    eval_fraction: float
    max_length: int
    truncation: Literal["drop", "error", "keep_start", "keep_end"]
    on_bad_row: Literal["error", "skip"]
    chat_template: str | None
    cache_dir: str


@dataclass(frozen=True)
class ReferenceConfig:
    path: str | None
    engine: Literal["hf", "zero", "adapter_off"]
    mode: Literal["cached", "live"]
    cache_dir: str
    offload: Literal["none", "cpu"]


@dataclass(frozen=True)
class LossConfig:
    """Options are None where the loss does not use them; what a loss uses, and its defaults, stand in loss_options.py."""

    name: str
    terms: dict[str, float] | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = None
    f_alpha: float | None = None
    ld_alpha: float | None = None
    wpo: bool | None = None
    discopop_tau: float | None = None
    simpo_gamma: float | None = None
    orpo_lambda: float | None = None
    cpo_alpha: float | None = None
    odpo_alpha: float | None = None

    @property
    def weights(self) -> dict[str, float]:
        """{name of a loss: its weight in the sum}; one entry of weight 1 unless this is a mixture."""
        return dict(self.terms) if self.terms else {self.name: 1.0}

    @property
    def needs_reference(self) -> bool:
        return any(LOSS_OPTIONS[name].needs_reference for name in self.weights)

    @property
    def uses_rejected(self) -> bool:
        """False where only the chosen completions are trained on, so that the rejected ones need no forward."""
        return set(self.weights) != {"sft"}

    @property
    def needs_whole_step(self) -> bool:
        """True where a pair's loss depends on the other pairs of the step (a sort over them)."""
        return any(LOSS_OPTIONS[name].needs_whole_step for name in self.weights)


@dataclass(frozen=True)
class OptimConfig:
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_ratio: float
    max_grad_norm: float | None


@dataclass(frozen=True)
class TrainConfig:
    pairs_per_step: int
    tokens_per_microbatch: int
    epochs: float
    max_steps: int | None
    seed: int
    log_every_steps: int
    eval_every_steps: int | None
    save_every_steps: int | None
    keep_checkpoints: int


@dataclass(frozen=True)
class ZeroConfig:
    stage: Literal[0, 1, 2, 3] | None
    offload_optimizer: Literal["none", "cpu"]
    offload_parameters: Literal["none", "cpu"]
    persistence_threshold: int


@dataclass(frozen=True)
class ClusterConfig:
    name: Literal["local"]
    nodes: int
    procs_per_node: int | None
    device: Literal["auto", "cpu", "cuda"]
    timeout_seconds: int


@dataclass(frozen=True)
class TrackingConfig:
    name: Literal["none", "wandb", "tensorboard"]
    project: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None


@dataclass(frozen=True)
class RunSection:
    dir: str | None
    offline: bool


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig
    loss: LossConfig
    optim: OptimConfig
    train: TrainConfig
    zero: ZeroConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    run: RunSection
    experiment: str | None = field(default=None)

    @property
    def reference_path(self) -> str:
        """The reference's weights: the policy's starting weights unless `reference.path` says otherwise."""
        return self.reference.path or self.model.path

    @property
    def run_dir(self) -> str:
        """Where the run lives. By default a function of what is trained, so that the same command finds its own run again."""
        if self.run.dir:
            return self.run.dir
        model = self.model.path.rstrip("/").rsplit("/", 1)[-1]
        return f"runs/{model}-{self.loss.name}-{self.identity()[:8]}"

    def identity(self) -> str:
        """A digest of what decides the weights: not where it runs, how it is followed, or how often it is saved."""
        return hashlib.sha256(json.dumps(self.identity_dict(), sort_keys=True).encode()).hexdigest()

    def identity_dict(self) -> dict[str, Any]:
        whole = to_dict(self)
        for section in ("cluster", "tracking", "run", "experiment", "zero"):
            whole.pop(section)
        for key in ("cache_dir", "engine", "mode", "offload"):
            whole["reference"].pop(key)
        whole["data"].pop("cache_dir")
        for key in ("tokens_per_microbatch", "log_every_steps", "eval_every_steps", "save_every_steps", "keep_checkpoints"):
            whole["train"].pop(key)
        for key in ("attention", "gradient_checkpointing"):
            whole["model"].pop(key)
        return whole


# ------------------------------------------------------------------------------------------------------------- decoding

ALIASES = {"float32": "fp32", "bfloat16": "bf16"}


def decode(raw: Mapping[str, Any]) -> RunConfig:
    """The RunConfig that a plain nested mapping describes. Raises UserError naming key, value and remedy."""
    config = _decode(RunConfig, raw, "")
    config = dataclasses.replace(config, loss=resolve_loss(config.loss))
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A plain, JSON-ready copy of a config dataclass (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """' Did you mean X?' for the closest valid name, or the list of them all where nothing is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(names)}"


def _decode(kind: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        for choice in kinds[:-1]:
            try:
                return _decode(choice, value, key)
            except UserError:
                continue
        return _decode(kinds[-1], value, key)
    if origin is Literal:
        value = ALIASES.get(value, value) if isinstance(value, str) else value
        if value not in args or isinstance(value, bool):
            raise UserError(f"{key}={value!r} is not allowed: {nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}={value!r} must be a list, as in {key}=[...]")
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inner) != len(value):
            raise UserError(f"{key}={value!r} must have {len(inner)} entries")
        return tuple(_decode(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{key}={value!r} must be a mapping, as in {key}={{name: number}}")
        return {str(k): _decode(args[1], v, f"{key}.{k}") for k, v in value.items()}
    return _decode_scalar(kind, value, key)


def _decode_dataclass(kind: Any, value: Any, key: str) -> Any:
    if kind is DatasetConfig and isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r} must be a mapping with keys {', '.join(f.name for f in dataclasses.fields(kind))}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in known:
            raise UserError(f"unknown key '{prefix}{name}': {nearest(str(name), known)}")
    out = {}
    for name, spec in known.items():
        if name in value:
            out[name] = _decode(hints[name], value[name], prefix + name)
        elif spec.default is dataclasses.MISSING:
            raise UserError(f"{prefix}{name} is missing; set {prefix}{name}=...")
    return kind(**out)


def _decode_scalar(kind: type, value: Any, key: str) -> Any:
    if value is None or value == "???":                  # ??? is what Hydra shows for a value that must be given
        raise UserError(f"{key} is not set; set {key}=...")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):        # YAML reads 5e-7 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)                                # a path such as 2024
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{key}={value!r} must be {_TYPE_NAMES[kind]}")
    return value


_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


# ------------------------------------------------------------------------------------------------------------ the rules


def resolve_loss(loss: LossConfig) -> LossConfig:
    """The loss with its own defaults filled in. An option that none of its terms uses is an error, never ignored."""
    if (loss.name == MIXTURE) != bool(loss.terms):
        raise UserError(f"loss.name={loss.name} with loss.terms={loss.terms}: a weighted sum takes loss.name={MIXTURE} and "
                        "loss.terms={sigmoid: 1.0, sft: 0.5}; a single loss takes no terms")
    for name in loss.weights:
        if name not in LOSS_OPTIONS:
            raise UserError(f"loss '{name}' is unknown: {nearest(name, [*LOSS_OPTIONS, MIXTURE])}")
    used: dict[str, Any] = {}
    for name in loss.weights:
        for option, default in LOSS_OPTIONS[name].defaults.items():
            if used.setdefault(option, default) != default and getattr(loss, option) is None:
                raise UserError(f"loss.{option} has another default for '{name}' than for the other terms of "
                                f"'{'+'.join(loss.weights)}'; set loss.{option}=...")
    filled: dict[str, Any] = {}
    for spec in dataclasses.fields(LossConfig):
        if spec.name in ("name", "terms"):
            continue
        value = getattr(loss, spec.name)
        if value is not None and spec.name not in used:
            raise UserError(f"loss.{spec.name}={value} is not used by loss '{'+'.join(loss.weights)}'; remove it "
                            f"(its options: {', '.join(sorted(used)) or 'none'})")
        filled[spec.name] = used.get(spec.name) if value is None else value
    if filled["f_alpha"] is not None and filled["f_divergence"] != "alpha_divergence":
        raise UserError(f"loss.f_alpha={filled['f_alpha']} needs loss.f_divergence=alpha_divergence")
    if filled["f_divergence"] == "alpha_divergence" and filled["f_alpha"] is None:
        filled["f_alpha"] = 0.5
    resolved = dataclasses.replace(loss, **filled)
    if resolved.needs_whole_step and filled["ld_alpha"] is not None:
        raise UserError(f"loss.ld_alpha={filled['ld_alpha']} does not go with a loss that sorts over the step; remove it")
    return resolved


def validate(c: RunConfig) -> None:
    """Raises UserError for values out of range and for keys that contradict each other."""
    def positive(**values: float | None) -> None:
        for key, value in values.items():
            if value is not None and not value > 0:
                raise UserError(f"{key.replace('__', '.')}={value} must be greater than 0")

    positive(data__max_length=c.data.max_length, train__pairs_per_step=c.train.pairs_per_step,
             train__tokens_per_microbatch=c.train.tokens_per_microbatch, train__epochs=c.train.epochs,
             train__max_steps=c.train.max_steps, train__log_every_steps=c.train.log_every_steps,
             train__eval_every_steps=c.train.eval_every_steps, train__save_every_steps=c.train.save_every_steps,
             train__keep_checkpoints=c.train.keep_checkpoints, cluster__nodes=c.cluster.nodes,
             cluster__procs_per_node=c.cluster.procs_per_node, cluster__timeout_seconds=c.cluster.timeout_seconds,
             optim__lr=c.optim.lr, loss__beta=c.loss.beta,
             loss__discopop_tau=c.loss.discopop_tau)
    _between("optim.warmup_ratio", c.optim.warmup_ratio, 0, 1)
    _between("optim.max_grad_norm", c.optim.max_grad_norm, 0, math.inf)
    _between("optim.weight_decay", c.optim.weight_decay, 0, math.inf)
    _between("data.eval_fraction", c.data.eval_fraction, 0, 0.9)
    _between("loss.ld_alpha", c.loss.ld_alpha, 0, 1)
    _validate_label_smoothing(c.loss)
    for split, sets in (("train", c.data.train), ("eval", c.data.eval)):
        for i, d in enumerate(sets):
            positive(**{f"data__{split}[{i}]__weight": d.weight})
            if split == "eval" and d.weight != 1.0:
                raise UserError(f"data.eval[{i}].weight={d.weight} would do nothing: held-out pairs are each counted once; remove it")
    if c.data.eval and c.data.eval_fraction:
        raise UserError(f"data.eval_fraction={c.data.eval_fraction} and data.eval are both set; keep one of them")
    if c.cluster.nodes > 1 and c.cluster.name == "local":
        raise UserError(f"cluster.nodes={c.cluster.nodes} cannot be started from here: run `torchrun --nnodes "
                        f"{c.cluster.nodes} ... -m dpo_dist.train` on each node, or set cluster.nodes=1")
    if c.model.lora.rank == 0 and c.model.lora.alpha is not None:
        raise UserError(f"model.lora.alpha={c.model.lora.alpha} does nothing while model.lora.rank=0; set model.lora.rank=16")
    if c.model.lora.rank == 0 and c.model.lora.target_modules != "all-linear":
        raise UserError(f"model.lora.target_modules={c.model.lora.target_modules} does nothing while model.lora.rank=0; set model.lora.rank=16")
    if c.train.eval_every_steps and not c.data.eval and not c.data.eval_fraction:
        raise UserError(f"train.eval_every_steps={c.train.eval_every_steps} has nothing to evaluate; set data.eval or data.eval_fraction=0.05")
    _validate_reference(c)
    _validate_zero(c)


def _validate_label_smoothing(loss: LossConfig) -> None:
    _between("loss.label_smoothing", loss.label_smoothing, 0, 0.5)
    for name in ("robust", "exo_pair"):
        if name in loss.weights and not loss.label_smoothing:
            raise UserError(f"loss.label_smoothing={loss.label_smoothing} must be greater than 0 for loss '{name}'")
    if loss.label_smoothing == 0.5:
        raise UserError("loss.label_smoothing=0.5 leaves no preference to learn; set it below 0.5")


def _validate_reference(c: RunConfig) -> None:
    if c.reference.engine == "adapter_off":
        if c.model.lora.rank == 0:
            raise UserError("reference.engine=adapter_off needs a LoRA policy; set model.lora.rank=16, or reference.engine=hf")
        if c.reference.path not in (None, c.model.path):
            raise UserError(f"reference.path={c.reference.path} differs from model.path={c.model.path}, but adapter_off takes the "
                            "policy's own base weights as reference; remove reference.path or set reference.engine=hf")
    if c.reference.offload != "none" and c.reference.engine != "zero":
        raise UserError(f"reference.offload={c.reference.offload} is only for reference.engine=zero, not {c.reference.engine}")
    if not c.loss.needs_reference:
        for key, default in (("path", None), ("engine", "hf"), ("mode", "cached")):
            if getattr(c.reference, key) != default:
                raise UserError(f"reference.{key}={getattr(c.reference, key)} would do nothing: loss.name={c.loss.name} uses no reference; "
                                "remove it")


def _validate_zero(c: RunConfig) -> None:
    if c.zero.stage != 3 and c.zero.offload_parameters != "none":
        raise UserError(f"zero.offload_parameters={c.zero.offload_parameters} needs zero.stage=3, not {c.zero.stage}")
    if c.zero.stage in (None, 0) and c.zero.offload_optimizer != "none":
        raise UserError(f"zero.offload_optimizer={c.zero.offload_optimizer} needs zero.stage=1, 2 or 3, not {c.zero.stage}")
    if c.zero.stage is None and (c.cluster.procs_per_node or 1) > 1:
        raise UserError(f"zero.stage=null is plain torch in one process, but cluster.procs_per_node={c.cluster.procs_per_node}; "
                        "set zero=zero3 or cluster.procs_per_node=1")
    if c.zero.stage is None and c.model.dtype == "bf16":
        raise UserError("model.dtype=bf16 needs DeepSpeed's fp32 master weights; set zero=zero0 (or higher) or model.dtype=fp32")


def _between(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise UserError(f"{key}={value} must be between {low} and {high}")
