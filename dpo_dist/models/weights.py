"""A live model → safetensors files that `from_pretrained` loads: streamed one tensor at a time, LoRA merged."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo_dist.models import quantized
from dpo_dist.models.load import ScoredModel

SHARD_BYTES = 5_000_000_000

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def merged_weights(model: ScoredModel, gathered: Gather = lambda parameters: nullcontext(),
                   keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name as in the model's files, whole CPU tensor) of each weight, LoRA merged in fp32. `gathered` makes sharded
    parameters whole, on all ranks at once. If not `keep`, tensors are empty: the rank only takes part in the gathering.
    """
    modules = dict(model.causal.named_modules())
    for name, parameter in model.causal.named_parameters():
        if ".lora_" in name:
            continue                                     # merged into its base weight
        layer = modules[name.rpartition(".")[0]]
        owner = modules[name.rpartition(".")[0].removesuffix(".base_layer")]
        adapters = _adapters(owner) if name.endswith(".base_layer.weight") else []
        with gathered([parameter, *adapters]):
            weight = quantized.whole_weight(layer, parameter) if keep else parameter.detach()
            if adapters and keep:
                merged = weight.float()
                for name_of_adapter in owner.active_adapters:
                    merged = merged + owner.get_delta_weight(name_of_adapter).detach().float()
                weight = merged.to(weight.dtype)
            whole = quantized.as_in_files(layer, weight).cpu().clone().contiguous() if keep else torch.empty(0)
        yield from _as_in_files(model.causal, name.replace(".base_layer", ""), whole)
    parameters = {name for name, _ in model.causal.named_parameters(remove_duplicate=False)}
    persistent = set(model.causal.state_dict(keep_vars=True)) - parameters
    for name, buffer in model.causal.named_buffers():
        if name in persistent:
            yield from _as_in_files(model.causal, name, buffer.detach().cpu().clone() if keep else torch.empty(0))


def _as_in_files(lm: PreTrainedModel, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a weight is in the files that the model came from, where transformers renames it or stacks experts when it
    loads them; other programs know those names only."""
    if not weight.numel():
        yield name, weight
        return
    parts = revert_weight_conversion(lm, {name: weight})
    for part, tensor in parts.items():
        # a piece of a stack shares its memory, which files cannot
        yield part, tensor.clone().contiguous() if len(parts) > 1 else tensor.contiguous()


def _adapters(layer: Any) -> list[nn.Parameter]:
    """A and B of each LoRA adapter on a layer: its weight is base + scaling · B A (arXiv 2106.09685, section 4.1)."""
    return [side[name].weight for name in layer.active_adapters for side in (layer.lora_A, layer.lora_B)]


def write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]], write: bool) -> None:
    """Writes model.safetensors, or numbered shards and their index if the model is larger. `write`: true on one rank
    only."""
    if not write:
        for _ in weights:                                # all ranks gather them together
            pass
        return
    shard: dict[str, Tensor] = {}
    files: list[Path] = []
    index: dict[str, int] = {}
    total = used = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if used and used + size > SHARD_BYTES:
            files.append(_write_shard(folder, len(files), shard))
            shard, used = {}, 0
        shard[name] = tensor
        index[name] = len(files)
        used, total = used + size, total + size
    files.append(_write_shard(folder, len(files), shard))
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    weight_map = {name: names[i] for name, i in index.items()}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    path = folder / f"part-{number}.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path
