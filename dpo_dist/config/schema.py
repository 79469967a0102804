"""RunConfig: everything a run is told, as one frozen tree. No torch here, so that help and errors are instant.

Defaults live in conf/*.yaml (one commented line a key); types and allowed values here; decode.py makes the tree from a plain mapping,
rules.py holds the rules between keys.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_dist.config.loss_options import LOSS_OPTIONS


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
    gradient_checkpointing: Literal["auto"] | bool | int
    kernels: Literal["auto", "eager", "fused"]
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
    group_by_prompt: bool
    cache_dir: str

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the tokenized pairs, besides the content of files and of the tokenizer; JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key not in ("cache_dir", "group_by_prompt")}


@dataclass(frozen=True)
class RequestsConfig:
    sequences: int
    at_once: int
    timeout_seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class AuditConfig:
    oracle: Literal["hf", "zero"]
    pairs: int
    token_mean: float | None
    token_max: float | None
    sequence_max: float | None
    margin_max: float | None


@dataclass(frozen=True)
class SyncConfig:
    """TR-DPO: the reference moves to the policy every so many steps."""

    mode: Literal["none", "soft", "hard"]
    alpha: float | None
    every_steps: int | None

    @property
    def share(self) -> float:
        """How much of the way to the policy the reference goes."""
        return 1.0 if self.alpha is None else self.alpha


@dataclass(frozen=True)
class ReferenceConfig:
    """What follows `sync` is for an engine in servers of its own (vllm); it is empty for the others."""

    path: str | None
    engine: Literal["hf", "zero", "tensor_parallel", "adapter_off", "vllm"]
    mode: Literal["cached", "live", "ahead"]
    procs: int | None
    cache_dir: str
    offload: Literal["none", "cpu", "disk"]
    tensor_parallel_size: int | None
    sync: SyncConfig
    urls: tuple[str, ...] | str = ()
    server: str | None = None
    nodes: int | None = None
    served_name: str | None = None
    version: str | None = None
    quantization: str | None = None
    requests: RequestsConfig | None = None
    audit: AuditConfig | None = None


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
    stage: Literal["auto", 0, 1, 2, 3] | None
    offload_optimizer: Literal["none", "cpu"]
    offload_parameters: Literal["none", "cpu"]
    persistence_threshold: int
    secondary_partition: int | None
    reduce_dtype: Literal["auto", "fp32"]

    @property
    def chosen_stage(self) -> int | None:
        """The stage, once `auto` has become one (sizing/automatic.py)."""
        assert self.stage != "auto", "zero.stage is chosen before it is asked for"
        return self.stage


@dataclass(frozen=True)
class SlurmConfig:
    partition: str | None
    account: str | None
    qos: str | None
    time_limit: str | None
    signal_seconds: int
    max_requeues: int
    exclude: str | None
    container_image: str | None
    container_mounts: tuple[str, ...]
    preflight: bool
    setup: tuple[str, ...]
    extra: tuple[str, ...]
    server_extra: tuple[str, ...]


@dataclass(frozen=True)
class ClusterConfig:
    name: Literal["local", "slurm"]
    nodes: int
    procs_per_node: int | None
    device: Literal["auto", "cpu", "cuda"]
    timeout_seconds: int
    peak_tflops: float | None
    environment: dict[str, str] | None
    jobs_at_once: int | None
    slurm: SlurmConfig | None = None


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

    @property
    def scorer_dir(self) -> str:
        """Where the scoring processes of reference.mode=ahead live: their logs, markers and lock, apart from the trainer's."""
        return f"{self.run_dir}/scoring"

    def identity(self) -> str:
        """A digest of what decides the weights: not where it runs, how it is followed, or how often it is saved."""
        return hashlib.sha256(json.dumps(self.identity_dict(), sort_keys=True).encode()).hexdigest()

    def identity_dict(self) -> dict[str, Any]:
        whole = to_dict(self)
        for section in ("cluster", "tracking", "run", "experiment", "zero"):
            whole.pop(section)
        for key in ("cache_dir", "engine", "mode", "procs", "offload", "tensor_parallel_size", "urls", "server", "nodes",
                    "served_name", "version", "quantization", "requests", "audit"):
            whole["reference"].pop(key)
        whole["data"].pop("cache_dir")
        for key in ("tokens_per_microbatch", "log_every_steps", "eval_every_steps", "save_every_steps", "keep_checkpoints"):
            whole["train"].pop(key)
        for key in ("attention", "gradient_checkpointing", "kernels"):
            whole["model"].pop(key)
        return whole


def to_dict(config: Any) -> dict[str, Any]:
    """A plain, JSON-ready copy of a config dataclass (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
