"""RunConfig: everything a run is told, as one frozen tree. No torch here, so that help and errors are instant.

A key's type, range and what it decides are declared here, or in the file of the variant that owns it (engines/,
cluster.py, tracking.py); its default and meaning stand in conf/*.yaml, one commented line a key. decode.py makes the
tree from a plain mapping; rules.py holds the rules between keys.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from dpo_dist.config.adapter import names_adapter
from dpo_dist.config.cluster import ClusterConfig
from dpo_dist.config.loss_options import LOSS_OPTIONS
from dpo_dist.config.options import RUN, TOKENS, deciding, option
from dpo_dist.config.reference import ReferenceConfig
from dpo_dist.config.tracking import TrackingConfig

ADAMW_BYTES = 8.0                          # of state an element: two moments in fp32


@dataclass(frozen=True)
class LoraConfig:
    rank: int = option(RUN)
    alpha: float | None = option(RUN)
    target_modules: tuple[str, ...] | str = option(RUN)
    modules_to_save: tuple[str, ...] = option(RUN, default=(), unnamed=())
    rslora: bool = option(RUN, default=False, unnamed=False)
    dora: bool = option(RUN, default=False, unnamed=False)


@dataclass(frozen=True)
class ModelConfig:
    path: str = option(RUN)
    dtype: Literal["auto", "fp32", "bf16"] = option(RUN)
    attention: Literal["auto", "branch", "padded"] = option()
    gradient_checkpointing: Literal["auto"] | bool | int = option()
    kernels: Literal["auto", "eager", "fused"] = option()
    lora: LoraConfig = option(RUN)
    quantization: Literal["none", "nf4"] = option(RUN, default="none", unnamed="none")


@dataclass(frozen=True)
class DatasetConfig:
    path: str = option(RUN, TOKENS)
    format: Literal["auto", "preference", "messages", "sharegpt", "hh", "ratings",
                    "token_ids", "openai", "swift", "alpaca", "axolotl", "helpsteer", "nemo_rl", "distilabel",
                    "ultrafeedback", "argilla", "kto", "arena"] = option(RUN, TOKENS, default="auto")
    weight: float = option(RUN, TOKENS, above=0, default=1.0)
    name: str | None = option(RUN, TOKENS, default=None)
    split: str = option(RUN, TOKENS, default="train")
    # {a name that formats know: the column that holds it, None for no column}
    columns: dict[str, str | None] | None = option(RUN, TOKENS, default=None, unnamed=None)
    subset: str | None = option(RUN, TOKENS, default=None, unnamed=None)           # of a hub data set
    revision: str | None = option(RUN, TOKENS, default=None, unnamed=None)         # of a hub data set
    # at most so many, chosen by their content
    rows: int | None = option(RUN, TOKENS, above=0, default=None, unnamed=None)
    # of a prompt at most so many, chosen by their content
    pairs_per_prompt: int | None = option(RUN, TOKENS, above=0, default=None, unnamed=None)


@dataclass(frozen=True)
class DataConfig:
    train: tuple[DatasetConfig, ...] = option(RUN, TOKENS)
    eval: tuple[DatasetConfig, ...] = option(RUN, TOKENS)
    eval_fraction: float = option(RUN, TOKENS, between=(0, 0.9))
    max_length: int = option(RUN, TOKENS, above=0)
    truncation: Literal["drop", "error", "keep_start", "keep_end"] = option(RUN, TOKENS)
    on_bad_row: Literal["error", "skip"] = option(RUN, TOKENS)
    on_missing_content: Literal["error", "warn"] = option(RUN, TOKENS, unnamed="error")
    train_on: Literal["assistant", "completion"] = option(RUN, TOKENS, unnamed="assistant")
    chat_template: str | None = option(RUN, TOKENS)
    chat_template_kwargs: dict[str, Any] | None = option(RUN, TOKENS, unnamed=None)
    group_by_prompt: bool = option(RUN)
    cache_dir: str = option()
    ties: Literal["drop", "keep"] = option(RUN, TOKENS, default="drop", unnamed="drop")


@dataclass(frozen=True)
class LossConfig:
    """Options are None where the loss does not use them. loss_options.py says what a loss uses, and its defaults."""

    name: str = option(RUN)
    terms: dict[str, float] | None = option(RUN, default=None)
    beta: float | None = option(RUN, above=0, default=None)
    label_smoothing: float | None = option(RUN, between=(0, 0.5), default=None)
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence",
                          "alpha_divergence"] | None = option(RUN, default=None)
    f_alpha: float | None = option(RUN, default=None)
    ld_alpha: float | None = option(RUN, between=(0, 1), default=None)
    wpo: bool | None = option(RUN, default=None)
    discopop_tau: float | None = option(RUN, above=0, default=None)
    simpo_gamma: float | None = option(RUN, default=None)
    orpo_lambda: float | None = option(RUN, default=None)
    cpo_alpha: float | None = option(RUN, default=None)
    odpo_alpha: float | None = option(RUN, default=None)
    tie_nu: float | None = option(RUN, above=0, default=None, unnamed=None)

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
        return any(LOSS_OPTIONS[name].uses_rejected for name in self.weights)

    @property
    def needs_whole_step(self) -> bool:
        """True where a pair's loss depends on the other pairs of the step (a sort over them)."""
        return any(LOSS_OPTIONS[name].needs_whole_step for name in self.weights)

    @property
    def needs_strength(self) -> bool:
        """True where every pair must say how much better chosen is."""
        return any(LOSS_OPTIONS[name].needs_strength for name in self.weights)

    @property
    def knows_ties(self) -> bool:
        """True where every term has a likelihood for pairs of which neither answer is better."""
        return all(LOSS_OPTIONS[name].knows_ties for name in self.weights)


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer as callers see it, whichever it is. Each of optimizers.py overrides what is different about it."""

    name: str = option(RUN, unnamed="adamw")
    lr: float = option(RUN, above=0)
    weight_decay: float = option(RUN, between=(0, float("inf")))
    betas: tuple[float, float] = option(RUN)
    eps: float = option(RUN, above=0)
    schedule: Literal["constant", "linear", "cosine"] = option(RUN)
    warmup_ratio: float = option(RUN, between=(0, 1))
    min_lr_ratio: float = option(RUN, between=(0, 1), unnamed=0.0)
    max_grad_norm: float | None = option(RUN, between=(0, float("inf")))

    title: ClassVar[str]                       # for people
    # its state can be cut up anew, so that a run goes on with another number of ranks under ZeRO 1 to 3
    may_reshard: ClassVar[bool] = True

    def state_bytes(self, matrices: float, embeddings: float, head: float, vectors: float) -> float:
        """Bytes of its state for so many trained elements: of the layers' matrices, of embeddings, of a head that is
        none of them, and of norms and biases. Here AdamW's."""
        return ADAMW_BYTES * (matrices + embeddings + head + vectors)

    def update_bytes(self, matrices: float, sharded: bool) -> float:
        """Bytes that the update takes for a moment, for so many elements of the layers' matrices on a rank."""
        return 0.0

    def update_flops(self, sides: Iterable[tuple[int, int]]) -> float:
        """FLOPs of an update besides those of each element, for matrices of these sides."""
        return 0.0

    def check(self, run: RunConfig) -> None:
        """UserError where this optimizer's keys contradict each other, or other keys."""


@dataclass(frozen=True)
class TrainConfig:
    pairs_per_step: int = option(RUN, above=0)
    tokens_per_microbatch: int = option(above=0)
    epochs: float = option(RUN, above=0)
    max_steps: int | None = option(RUN, above=0)
    seed: int = option(RUN)
    log_every_steps: int = option(above=0)
    eval_every_steps: int | None = option(above=0)
    save_every_steps: int | None = option(above=0)
    save_every_minutes: float | None = option(above=0)
    save_in_background: bool = option()
    keep_checkpoints: int = option(above=0)
    keep_every_hours: float | None = option(above=0)
    keep_best: str | None = option(RUN, unnamed=None)            # decides which weights are the run's


@dataclass(frozen=True)
class JudgeConfig:
    command: tuple[str, ...] | None = option()
    url: str | None = option()
    against: Literal["before", "chosen"] = option()
    timeout_seconds: float = option(above=0)

    @property
    def is_asked(self) -> bool:
        return self.command is not None or self.url is not None

    @property
    def key(self) -> str:
        """The key that names it."""
        return f"eval.judge.{'url' if self.command is None else 'command'}"


@dataclass(frozen=True)
class HarnessConfig:
    tasks: tuple[str, ...] = option()
    path: str | None = option()
    python: str | None = option()
    arguments: tuple[str, ...] = option()


@dataclass(frozen=True)
class EvalConfig:
    samples: int = option(between=(0, float("inf")))
    max_new_tokens: int = option(above=0)
    temperature: float = option(between=(0, float("inf")))
    judge: JudgeConfig = option()
    harness: HarnessConfig = option()


@dataclass(frozen=True)
class GuardConfig:
    """What each guard does where it finds something."""

    on_displacement: Literal["off", "warn", "stop"] = option()
    on_length: Literal["off", "warn", "stop"] = option()
    on_repetition: Literal["off", "warn", "stop"] = option()


@dataclass(frozen=True)
class AuditConfig:
    fail_on: Literal["none", "error", "warning"] = option()
    against: tuple[DatasetConfig, ...] = option()


@dataclass(frozen=True)
class ZeroConfig:
    stage: Literal["auto", 0, 1, 2, 3] | None = option()
    offload_optimizer: Literal["none", "cpu"] = option()
    offload_parameters: Literal["none", "cpu"] = option()
    persistence_threshold: int = option()
    secondary_partition: int | None = option()
    reduce_dtype: Literal["auto", "fp32"] = option()

    @property
    def chosen_stage(self) -> int | None:
        """The stage, once `auto` has become one (sizing/automatic.py)."""
        assert self.stage != "auto", "zero.stage is chosen before it is asked for"
        return self.stage


@dataclass(frozen=True)
class ExportConfig:
    what: Literal["merged", "adapter", "both"] = option()
    push_to_hub: str | None = option()

    @property
    def merged(self) -> bool:
        return self.what != "adapter"

    @property
    def adapter(self) -> bool:
        return self.what != "merged"


@dataclass(frozen=True)
class RunSection:
    dir: str | None = option()
    offline: bool = option()
    readable_by: Literal["owner", "group", "all"] = option(default="owner")


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = option(RUN)
    data: DataConfig = option(RUN)
    reference: ReferenceConfig = option(RUN)
    loss: LossConfig = option(RUN)
    optim: OptimConfig = option(RUN)
    train: TrainConfig = option(RUN)
    eval: EvalConfig = option()
    guard: GuardConfig = option()
    audit: AuditConfig = option()
    export: ExportConfig = option()
    zero: ZeroConfig = option()
    cluster: ClusterConfig = option()
    tracking: TrackingConfig = option()
    run: RunSection = option()
    experiment: str | None = option(default=None)

    @property
    def reference_path(self) -> str:
        """The reference's weights: the policy's starting weights unless `reference.path` says otherwise."""
        return self.reference.path or self.model.path

    @property
    def reference_quantization(self) -> str:
        """As model.quantization, of the reference: the policy's starting weights, or the files of `reference.path` as
        they are; the policy's own base where an engine computes with it."""
        return self.model.quantization if self.reference.path is None or self.reference.is_policy else "none"

    @property
    def trains_adapter(self) -> bool:
        """Whether the policy trains LoRA adapters, fresh ones or those of model.path, and its base stays frozen."""
        return self.model.lora.rank > 0 or names_adapter(self.model.path)

    @property
    def scores_apart(self) -> bool:
        """Whether scoring is a stage of its own, so that the trainer never shares memory with the reference."""
        return self.loss.needs_reference and self.reference.mode == "cached" and not self.reference.is_policy

    @property
    def run_dir(self) -> str:
        """Where the run lives. By default it follows from what is trained: the same command finds the run again."""
        if self.run.dir:
            return self.run.dir
        model = self.model.path.rstrip("/").rsplit("/", 1)[-1]
        return f"runs/{model}-{self.loss.name}-{self.identity()[:8]}"

    @property
    def scorer_dir(self) -> str:
        """The folder of the scoring processes of reference.mode=ahead: their own logs, markers and lock."""
        return f"{self.run_dir}/scoring"

    def identity(self) -> str:
        """A digest of what decides the weights: not where it runs, how it is followed, or how often it is saved."""
        return hashlib.sha256(json.dumps(self.identity_dict(), sort_keys=True).encode()).hexdigest()

    def identity_dict(self) -> dict[str, Any]:
        return deciding(self, RUN)


def with_keys(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with these keys changed, as in {"zero.stage": 2}."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config
