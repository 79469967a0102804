"""The optimizers: each one's keys, rules and memory. What computes is in policy/optimizers/<name>.py. No torch here."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import RUN, option
from dpo_dist.config.schema import ADAMW_BYTES, OptimConfig, RunConfig

BLOCK = 256                                # elements that share an 8-bit moment's scale, in bitsandbytes


@dataclass(frozen=True)
class AdamWConfig(OptimConfig):
    name: Literal["adamw"] = option(RUN, unnamed="adamw")

    title = "AdamW"


@dataclass(frozen=True)
class CpuAdamConfig(OptimConfig):
    """DeepSpeed's C++ kernel for state in CPU memory."""

    name: Literal["cpu_adam"] = option(RUN)

    title = "AdamW (DeepSpeed's CPU Adam)"

    def check(self, run: RunConfig) -> None:
        if run.zero.offload_optimizer != "cpu":
            raise UserError(f"optim.name={self.name} updates state that lies in CPU memory, but "
                            f"zero.offload_optimizer={run.zero.offload_optimizer}; set zero.offload_optimizer=cpu, or "
                            "optim=adamw")


@dataclass(frozen=True)
class AdamW8bitConfig(OptimConfig):
    """AdamW with moments of 8 bits, in blocks with a scale each (arXiv 2110.02861), by bitsandbytes."""

    name: Literal["adamw_8bit"] = option(RUN)

    title = "8-bit AdamW"
    may_reshard = False                    # a scale belongs to the elements that a rank holds side by side

    def state_bytes(self, matrices: float, embeddings: float, head: float, vectors: float) -> float:
        return 2 * (1 + 4 / BLOCK) * (matrices + head) + ADAMW_BYTES * (embeddings + vectors)

    def check(self, run: RunConfig) -> None:
        if run.zero.offload_optimizer != "none":
            raise UserError(f"optim.name={self.name} makes state small so that it fits on the device, but "
                            f"zero.offload_optimizer={run.zero.offload_optimizer} keeps it in CPU memory, where its "
                            "kernels are slow; set zero.offload_optimizer=none, or optim=adamw")


@dataclass(frozen=True)
class MuonConfig(OptimConfig):
    """Muon for the layers' matrices (Jordan et al. 2024; its learning rate as in Moonlight, arXiv 2502.16982), AdamW
    for all else."""

    name: Literal["muon"] = option(RUN)
    momentum: float = option(RUN, between=(0, 1))
    nesterov: bool = option(RUN)
    ns_steps: int = option(RUN, between=(1, 99))
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = option(RUN)
    adamw_lr_ratio: float = option(RUN, above=0)

    title = "Muon for the layers' matrices, AdamW for the rest"

    def state_bytes(self, matrices: float, embeddings: float, head: float, vectors: float) -> float:
        return 4.0 * matrices + ADAMW_BYTES * (embeddings + head + vectors)

    def update_bytes(self, matrices: float, sharded: bool) -> float:
        # bf16: pieces that leave and come, twice; alone, one matrix at a time
        return 8.0 * matrices if sharded else 0.0

    def update_flops(self, sides: Iterable[tuple[int, int]]) -> float:
        # of each iteration the products x x^T, its square, and that times x
        shorter_first = (sorted(pair) for pair in sides)
        return sum(self.ns_steps * (4.0 * m * m * n + 2.0 * m**3) for m, n in shorter_first)

    def check(self, run: RunConfig) -> None:
        if self.momentum == 1:
            raise UserError(f"optim.momentum={self.momentum} must be less than 1")
        if self.momentum == 0 and self.nesterov:
            raise UserError("optim.nesterov=true would do nothing with optim.momentum=0; set optim.nesterov=false")
        if run.trains_adapter:
            trained = (f"model.lora.rank={run.model.lora.rank}" if run.model.lora.rank else
                       f"model.path={run.model.path}, an adapter,")
            raise UserError(f"optim.name={self.name} makes the update of a weight matrix orthogonal, and {trained} "
                            "trains two factors instead, whose product that says nothing of; set optim=adamw, or train "
                            "whole weights")
        if run.zero.offload_optimizer != "none":
            raise UserError(f"optim.name={self.name} multiplies matrices in its update, which "
                            f"zero.offload_optimizer={run.zero.offload_optimizer} would do on the CPU; set "
                            "zero.offload_optimizer=none, or optim=adamw")


OPTIMIZERS: dict[str, type[OptimConfig]] = {
    "adamw": AdamWConfig,
    "cpu_adam": CpuAdamConfig,
    "adamw_8bit": AdamW8bitConfig,
    "muon": MuonConfig,
}
