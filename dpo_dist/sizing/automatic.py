"""What `auto` becomes: the ZeRO stage and the recomputed layers, chosen by predicted memory. No torch here."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dpo_dist.config.options import override
from dpo_dist.config.schema import RunConfig, with_keys
from dpo_dist.sizing.estimate import GIB, dtype_bytes, memory
from dpo_dist.sizing.hardware import Hardware
from dpo_dist.sizing.lengths import Lengths, Packs
from dpo_dist.sizing.shape import ModelShape

# values of model.gradient_checkpointing: everything is kept; cheap parts are recomputed; all layers are recomputed
EVERYTHING, CHEAP_PARTS, ALL_LAYERS = False, 0, True


@dataclass(frozen=True)
class Choice:
    config: RunConfig            # neither of the two keys is auto any more
    line: str | None             # what was chosen and why, for a person; None where there was nothing to weigh


def is_automatic(config: RunConfig) -> bool:
    return config.zero.stage == "auto" or config.model.gradient_checkpointing == "auto"


def choose(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware,
           packs: Packs | None = None) -> Choice:
    """The lowest ZeRO stage that fits while all activations are kept, or only the layers' cheap parts are recomputed.
    If none does: the lowest that fits with the fewest whole layers recomputed. If nothing fits: what takes least.

    packs: what a rank forwards at once, where it is not that of mean lengths.
    """
    if not is_automatic(config):
        return Choice(config, None)

    chosen = next((c for c in _candidates(config, shape.layers, world.ranks, dtype_bytes(config, world.device))
                   if memory(c, shape, lengths, world, packs).fits(world.device)), None)
    config = chosen or _least(config, world.ranks)
    peak = memory(config, shape, lengths, world, packs).peak
    ends = "" if chosen else ", which is more than there is: `dpo-dist plan` names what would fit"
    return Choice(config, f"memory: {_keys(config)} of {shape.layers} layers; predicted {peak / GIB:.1f} GiB a rank, "
                          f"of {world.device.memory / GIB:.1f}{ends}")


def without_sizes(config: RunConfig, ranks: int, on_gpu: bool, why: str) -> Choice:
    """The choice for a model of unknown size: on a GPU what takes least memory, elsewhere what is fastest."""
    if not is_automatic(config):
        return Choice(config, None)
    config = _least(config, ranks) if on_gpu else next(_candidates(config, 1, ranks, 4))
    return Choice(config, f"memory: {_keys(config)}, as sizes are not known here ({why}); set both for more speed "
                          "where memory allows")


def _candidates(config: RunConfig, layers: int, ranks: int, width: int) -> Iterator[RunConfig]:
    """In the order of preference."""
    setting = config.model.gradient_checkpointing
    quick: list[bool | int] = [EVERYTHING, CHEAP_PARTS] if setting == "auto" else [setting]
    slow: list[bool | int] = [*range(1, layers), ALL_LAYERS] if setting == "auto" else []
    for amounts in (quick, slow):
        for stage in stages(config, ranks, width):
            yield from (_with(config, stage, again) for again in amounts)


def _least(config: RunConfig, ranks: int) -> RunConfig:
    setting = config.model.gradient_checkpointing
    return _with(config, stages(config, ranks, 2)[-1], ALL_LAYERS if setting == "auto" else setting)


def stages(config: RunConfig, ranks: int, width: int) -> list[int | None]:
    """The stages to choose from, lowest first; `width`: bytes of a weight. In bf16 the lowest is 2: DeepSpeed's stage 1
    holds the whole fp32 gradient on every rank, and reduces it after backward instead of during it."""
    zero = config.zero
    if zero.stage != "auto":
        return [zero.stage]
    if zero.offload_parameters != "none" or zero.secondary_partition is not None:
        return [3]
    if zero.offload_optimizer != "none":
        return [2, 3] if ranks > 1 else [2]
    if ranks == 1:
        return [None]
    return [2, 3] if width == 2 else [0, 1, 2, 3]


def _with(config: RunConfig, stage: int | None, again: bool | int | str) -> RunConfig:
    return with_keys(config, {"zero.stage": stage, "model.gradient_checkpointing": again})


def _keys(config: RunConfig) -> str:
    return (f"{override('zero.stage', config.zero.stage)}, "
            f"{override('model.gradient_checkpointing', config.model.gradient_checkpointing)}")
