"""Models larger than memory: weights stay in their files, and a layer is on the device only for its own forward."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_dist.config.errors import UserError
from dpo_dist.models.folder import stored_dtype
from dpo_dist.models.load import ScoredModel, load_causal_lm


def load_streamed(folder: Path, dtype: torch.dtype, attention: str, device: torch.device) -> ScoredModel:
    """A frozen ScoredModel on `device` that holds a layer at a time, in `dtype`, with a whole one's numbers.

    Loaded in the files' own dtype, parameters are views of the mapped files: pages that the system reads when they are
    touched and drops when memory is wanted. UserError where transformers must rewrite weights while it loads them
    (stacked experts).
    """
    model = ScoredModel(load_causal_lm(folder, stored_dtype(folder), attention), attention).requires_grad_(False)
    for name, parameter in model.named_parameters():
        # memory of torch's own: a copy, not a view of a mapped file
        if parameter.untyped_storage().resizable():
            raise UserError(f"reference.offload=disk cannot read {name} of {folder} in place, as transformers makes it "
                            "from several tensors of the files; set reference=zero with reference.offload=cpu, or "
                            "reference=tensor_parallel")
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for module in _units(model):
        _stream(module, dtype, device)
    return model


def _units(model: ScoredModel) -> Iterator[nn.Module]:
    """What is brought to the device together: each decoder layer, and each module outside them that owns parameters."""
    layers = [layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m]
    inside = {id(module) for layer in layers for module in layer.modules()}
    yield from layers
    yield from (m for m in model.modules() if id(m) not in inside and any(True for _ in m.parameters(recurse=False)))


def _stream(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    stored = [(parameter, parameter.data) for parameter in module.parameters()]

    def bring(*_: Any) -> None:
        for parameter, weights in stored:
            parameter.data = weights.to(device, dtype) if weights.is_floating_point() else weights.to(device)

    def drop(*_: Any) -> None:
        for parameter, weights in stored:
            parameter.data = weights

    module.register_forward_pre_hook(bring)
    module.register_forward_hook(drop, always_call=True)
