"""The reference's keys that all engines share, and what callers ask an engine. Each engine's own: config/engines/."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import RUN, option

if TYPE_CHECKING:
    from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class SyncConfig:
    """TR-DPO: the reference moves to the policy every so many steps."""

    mode: Literal["none", "soft", "hard"] = option(RUN)
    alpha: float | None = option(RUN)
    every_steps: int | None = option(RUN, above=0)

    @property
    def share(self) -> float:
        """How much of the way to the policy the reference goes."""
        return 1.0 if self.alpha is None else self.alpha


@dataclass(frozen=True)
class ReferenceConfig:
    """An engine as callers see it, whichever it is. Each engine overrides what is different about it."""

    path: str | None = option(RUN)
    engine: str = option()
    mode: Literal["cached", "live", "ahead"] = option()
    procs: int | None = option(above=0)
    cache_dir: str = option()
    sync: SyncConfig = option(RUN)

    # the reference is the policy itself: no weights, no process of its own
    is_policy: ClassVar[bool] = False
    bare_base: ClassVar[bool] = False              # ... without the adapter that it may start from
    adapter_beside: ClassVar[bool] = False         # ... with the reference's adapter, which is loaded beside its own
    outside: ClassVar[bool] = False                # not of the training stack: see OutsideConfig
    uses_deepspeed: ClassVar[bool] = False
    gathers_weights: ClassVar[bool] = False        # sharded: a layer is made whole on every rank while it computes
    may_follow: ClassVar[bool] = False             # its weights can be changed, so it can follow the policy (TR-DPO)
    needs_less: ClassVar[str] = "reference=zero"   # what to set if this engine does not fit in memory

    @property
    def computes_quantized(self) -> bool:
        """Whether it can compute quantized weights."""
        return False

    @property
    def described(self) -> str:
        """Its keys, as far as they say which weights it can compute."""
        offload = getattr(self, "offload", "none")
        return f"reference.engine={self.engine}" + (f" with reference.offload={offload}" if offload != "none" else "")

    @property
    def may_adapt(self) -> bool:
        """Whether it can compute a base with an adapter on it."""
        return False

    @property
    def may_fuse(self) -> bool:
        """Whether fused kernels may compute its norms, rotary embedding and SwiGLU, which in bf16 round otherwise."""
        return True

    @property
    def server_nodes(self) -> int:
        """Nodes that are held for servers of the reference, beside those of the ranks."""
        return 0

    @property
    def server_gpus(self) -> int:
        """GPUs of such a node."""
        return 1

    def recipe(self, rounds: bool, ranks_of_node: int) -> list[str]:
        """What else decides a value besides weights, dtype and tokens. rounds: the dtype is narrower than fp32."""
        return []

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        """The share of the weights that a rank holds. piece: the largest part that is loaded at once, as a share."""
        return 1.0

    def check(self, run: RunConfig) -> None:
        """UserError where this engine's keys contradict other keys. Rules for every engine are in rules.py."""


@dataclass(frozen=True)
class OfPolicyConfig(ReferenceConfig):
    """An engine that is the LoRA policy with its adapters switched off, or another one in their place."""

    is_policy = True

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        return 1.0 / ranks if policy_is_sharded else 1.0

    def check(self, run: RunConfig) -> None:
        if not run.trains_adapter:
            raise UserError(f"reference.engine={self.engine} needs a LoRA policy; set model.lora.rank=16, or give an "
                            "adapter as model.path, or set reference.engine=hf")


@dataclass(frozen=True)
class AuditConfig:
    """Within which bounds values are believed; None = those of the dtype (reference/audit.py)."""

    oracle: Literal["hf", "zero"] = option()
    pairs: int = option(above=0)
    token_mean: float | None = option(above=0)
    token_max: float | None = option(above=0)
    sequence_max: float | None = option(above=0)
    margin_max: float | None = option(above=0)


@dataclass(frozen=True)
class OutsideConfig(ReferenceConfig):
    """An engine outside the training stack. Its values have a cache key of their own and are audited before use."""

    audit: AuditConfig = option()

    outside = True

    def oracle(self) -> ReferenceConfig:
        """The engine of the training stack that this one's values are held against."""
        from dpo_dist.config.engines import ENGINES

        return ENGINES[self.audit.oracle](self.path, self.audit.oracle, self.mode, self.procs, self.cache_dir,
                                          self.sync)
