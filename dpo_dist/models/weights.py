"""A live model → safetensors files that `from_pretrained` loads: streamed one tensor at a time, LoRA merged; and the
adapter alone."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo_dist.models import quantized
from dpo_dist.models.load import ScoredModel
from dpo_dist.models.lora import TRAINED, as_in_file, is_of
from dpo_dist.runtime.tensor_file import TensorFile

SHARD_BYTES = 5_000_000_000

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def merged_weights(model: ScoredModel, gathered: Gather = lambda parameters: nullcontext(),
                   keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name as in the model's files, whole CPU tensor) of each weight, LoRA merged in fp32. `gathered` makes sharded
    parameters whole, on all ranks at once. If not `keep`, tensors are empty: the rank only takes part in the gathering.
    """
    modules = dict(model.causal.named_modules())
    for name, parameter in model.causal.named_parameters():
        merged_name = _merged_name(name, modules)
        if merged_name is None:
            continue
        layer = modules[name.rpartition(".")[0]]
        owner = modules[name.rpartition(".")[0].removesuffix(".base_layer")]
        adapters = _adapter_of(owner) if name.endswith(".base_layer.weight") else []
        with gathered([parameter, *adapters]):
            weight = quantized.whole_weight(layer, parameter) if keep else parameter.detach()
            if adapters and keep:
                weight = _merged(owner, weight.float()).to(weight.dtype)
            whole = quantized.as_in_files(layer, weight).cpu().clone().contiguous() if keep else torch.empty(0)
        yield from _as_in_files(model.causal, merged_name, whole)
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


def _merged_name(name: str, modules: dict[str, Any]) -> str | None:
    """What a parameter is called in the merged model; None for one that is not a weight of its own there."""
    if ".lora_" in name:
        return None                                      # merged into its base weight
    for part in (".original_module.", ".modules_to_save."):
        wrapper, found, own = name.partition(part)
        if found:                                        # of modules that are trained whole, the trained one
            adapter, _, rest = own.partition(".")
            copies = modules[wrapper].modules_to_save
            if part == ".modules_to_save.":
                return f"{wrapper}.{rest}" if adapter == TRAINED else None
            return None if TRAINED in copies else f"{wrapper}.{own}"
    return name.replace(".base_layer", "")


def _adapter_of(layer: Any) -> list[nn.Parameter]:
    """The parameters of the trained adapter on a layer; none where it has none there."""
    return [p for name, p in layer.named_parameters() if is_of(f".{name}", TRAINED)]


def _merged(layer: Any, base: Tensor) -> Tensor:
    """A layer's fp32 weight with its adapter: W + scaling · B A (arXiv 2106.09685, section 4.1). DoRA gives it lengths
    of its own along each output: m (W + scaling · B A) / |W + scaling · B A| (arXiv 2402.09353, equation 5)."""
    weight = base + layer.get_delta_weight(TRAINED).detach().float()
    if TRAINED not in layer.lora_magnitude_vector:
        return weight
    magnitude = layer.lora_magnitude_vector[TRAINED].weight.detach().float()
    inputs = 0 if layer.fan_in_fan_out else 1            # GPT-2's matrices are transposed
    return weight * (magnitude / weight.norm(dim=inputs)).unsqueeze(inputs)


def adapter_weights(model: ScoredModel, gathered: Gather, keep: bool) -> dict[str, Tensor]:
    """{name as peft writes it: whole CPU tensor} of the trained adapter; empty if not `keep`. As merged_weights."""
    whole = {}
    for name, parameter in model.lm.named_parameters():
        if is_of(name, TRAINED):
            with gathered([parameter]):
                if keep:
                    whole[name] = parameter.detach().cpu().clone().contiguous()
    return as_in_file(model.lm, whole) if keep else {}


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
    TensorFile(tensors, {"format": "pt"}).write(path)
    return path
