"""The trained weights by what they are in the model: optimizers treat matrices, embeddings and the rest apart."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dpo_dist.models.load import ScoredModel
from dpo_dist.models.text import layer_stack


@dataclass(frozen=True)
class TrainedWeights:
    """What an optimizer updates, in the model's order."""

    everything: list[nn.Parameter]
    matrices: list[nn.Parameter]           # of the decoder layers; also experts, stacked in three dimensions
    embeddings: list[nn.Parameter]         # and a head that is one
    shapes: dict[nn.Parameter, torch.Size]               # whole, also where ZeRO-3 has sharded them


def trained_weights(model: ScoredModel, updated: Mapping[str, nn.Parameter] | None = None) -> TrainedWeights:
    """The model's trained weights, or in their place the parameters of the same names in `updated` (fp32 copies)."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_layers = {id(p) for p in layer_stack(model.causal).parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    filters = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in own.items()}
    taken = own if updated is None else updated

    def of(names: list[str]) -> list[nn.Parameter]:
        return [taken[name] for name in names]

    matrices = [name for name, p in own.items()
                if id(p) in in_layers - embeddings - filters and len(shapes[name]) in (2, 3)]
    return TrainedWeights(of(list(own)), of(matrices), of([n for n, p in own.items() if id(p) in embeddings]),
                          {taken[name]: torch.Size(shape) for name, shape in shapes.items()})
