"""Recomputing in backward what forward did not keep: whole decoder layers, or only their cheap parts.

Between keeping everything and recomputing whole layers (a third more arithmetic) lies recomputing norms, rotary
embeddings and activations alone: they take many bytes to keep and next to nothing to do again, while products and
attention are the reverse ("Reducing activation recomputation in large transformer models", arXiv 2205.05198).
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_dist.config.errors import UserError
from dpo_dist.models.text import backbone

aten = torch.ops.aten
# Not eager attention's bmm: its scores grow with the square of the length, so they are recomputed.
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten._grouped_mm.default}
# in names of operators: attention of aten, torch_attn, flash_attn; the product of bitsandbytes
_COSTLY = ("_attention", "_attn", "flash_attn", "gemm_4bit")
_MUCH_WIDER = 8                                                     # columns of a product over what it sums: LoRA's B


def decoder_layers(model: Any) -> list[GradientCheckpointingLayer]:
    """The language model's layers that can be recomputed, from the first to the last."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = backbone(lm) if isinstance(lm, PreTrainedModel) else lm
    return [m for m in text.modules() if isinstance(m, GradientCheckpointingLayer)]


def checkpoint_layers(model: nn.Module, how: bool | int) -> None:
    """False: backward finds everything kept. True: it recomputes every layer. N: it recomputes the first N layers, and
    only the cheap parts of the others.

    Layers must not draw random numbers, as generators' states are not kept: load_causal_lm switches dropout off.
    UserError where the model's layers cannot be recomputed, or are fewer than N.
    """
    if how is False:
        return
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"model.gradient_checkpointing={str(how).lower()}: the layers of this model cannot be "
                        "recomputed by transformers (they are no GradientCheckpointingLayer); set "
                        "model.gradient_checkpointing=false")
    whole = len(layers) if how is True else int(how)
    if whole > len(layers):
        raise UserError(f"model.gradient_checkpointing={whole}, but the model has {len(layers)} layers; give at most "
                        f"{len(layers)}")
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = again if i < whole else partial(again, context_fn=_contexts)
        for module in layer.modules() if i >= whole else ():
            if type(module) is nn.Linear and module.bias is not None:
                vars(module)["forward"] = MethodType(_flat_linear, module)


def _flat_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """x W^T + b over rows of tokens: one operator with any F.linear. DeepSpeed's (ZeRO-3) adds the bias to a product of
    three dimensions in place. If that product is kept, recomputing would add the bias a second time."""
    return F.linear(x.reshape(-1, x.shape[-1]), linear.weight, linear.bias).view(*x.shape[:-1], -1)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts for a layer: in forward, where outputs of products and attention are kept; and in its recomputation."""
    forward, again = create_selective_checkpoint_contexts(_policy)
    return _both(_NoneInPlace(), forward), again


def _policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Depends on the operator and its shapes only: torch before 2.13 asks again when it recomputes, and needs the same
    answer."""
    return CheckpointPolicy.MUST_SAVE if _is_costly(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


class _NoneInPlace(TorchDispatchMode):
    """Raises UserError where a kept output is changed in place: what is kept has the change already, and recomputing
    would make it a second time. torch's own check does not see changes inside an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.is_mutable and any(_storage(x) in self._kept for x in _written(operator, args)):
            raise UserError("model.gradient_checkpointing keeps the outputs of products, but this model changes one "
                            f"in place ({operator}); set model.gradient_checkpointing=true or false")
        out = operator(*args, **(kwargs or {}))
        if _is_costly(operator, args):
            self._kept.add(_storage(out[0] if isinstance(out, tuple) else out))
        return out


def _storage(tensor: Tensor) -> int:
    """Where a tensor has its bytes."""
    return tensor.untyped_storage().data_ptr()


def _written(operator: Any, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among its positional arguments that an operator changes in place."""
    for argument, value in zip(operator._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            yield value


def _is_costly(operator: Any, args: tuple[Any, ...]) -> bool:
    """True for what takes longer to compute than to read: products and attention, but not LoRA's small B."""
    if operator in _PRODUCTS:
        matrix = args[2 if operator is aten.addmm.default else 1]
        return matrix.shape[-1] < _MUCH_WIDER * matrix.shape[-2]
    return any(part in operator._schema.name for part in _COSTLY)
