"""On GPUs: norms, SwiGLU and rotary embedding by one kernel each way instead of five to ten, keeping only their inputs.

A module's own forward is replaced where its arithmetic is that of Llama's, which is found out by computing, not by its
name. Modules keep their parameters and names, so checkpoints, adapters and ZeRO's hooks see the model that they know.

In bf16 the numbers differ a little from the model's own: it rounds after each operation, a kernel once at the end,
nearer to the truth.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PretrainedConfig

from dpo_dist.config.errors import UserError
from dpo_dist.models.tiny import tiny_backbone
from dpo_dist.models.trial import first_line, worst_error

NORM, SWIGLU, ROTARY = "norms", "SwiGLU", "rotary embedding"
ROTARY_FUNCTION = "apply_rotary_pos_emb"            # what transformers' attention modules call


@dataclass(frozen=True)
class Kernels:
    """The functions of fused_kernels.py, or plain ones in tests. `norm` is None where torch has none (before 2.10)."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] | None
    norm_backward: Callable[..., tuple[Tensor | None, Tensor | None]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def gpu_kernels() -> Kernels:
    """The kernels of fused_kernels.py. ImportError where Triton is missing."""
    from dpo_dist.models import fused_kernels as k

    norm = k.norm if hasattr(torch.ops.aten, "_fused_rms_norm_backward") else None
    return Kernels(norm, k.norm_backward, k.swiglu, k.swiglu_backward, k.rotate)


class Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        assert kernels.norm is not None
        out, scale = kernels.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kernels = kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.kernels.norm_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[:2]), None, None


class SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.kernels.swiglu_backward(grad, *ctx.saved_tensors), None


class Rotary(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.kernels.rotate(grad, *ctx.saved_tensors, True), None, None, None


# ------------------------------------------------------------------------------------------------------------ replacing


def fuse(model: nn.Module, kernels: Kernels | None = None) -> list[str]:
    """Replaces the forwards of modules that compute what Llama's do. Returns the kinds that were replaced."""
    kernels = kernels or gpu_kernels()
    found: dict[str, None] = {}
    with torch.random.fork_rng(devices=[]):
        for module in model.modules():
            for kind, forward in _replacements(module, kernels):
                vars(module)["forward"] = MethodType(forward, module)
                found[kind] = None
    return list(found)


def _replacements(module: nn.Module, kernels: Kernels) -> Iterator[tuple[str, Any]]:
    """(kind, forward) of each kind of which the module computes what Llama's does."""
    if kernels.norm is not None and type(module).__name__.endswith("RMSNorm") and _computes_llamas_norm(module):
        yield NORM, _norm_forward(type(module).forward, kernels)
    mlp = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if all(hasattr(module, name) for name in mlp) and _computes_swiglu(module):
        yield SWIGLU, _mlp_forward(kernels)
    own = type(module).forward
    if (isinstance(own, FunctionType) and ROTARY_FUNCTION in own.__code__.co_names
            and ROTARY_FUNCTION in own.__globals__ and (forward := _attention_forward(own, kernels)) is not None):
        yield ROTARY, forward


def _eps(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _norm_forward(own: Any, kernels: Kernels) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:                    # the model's own promotes
            return own(self, hidden_states)
        return Norm.apply(hidden_states, self.weight, _eps(self), kernels)

    return forward


def _mlp_forward(kernels: Kernels) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x), kernels))

    return forward


@cache                                              # one copy for all layers of a class
def _attention_forward(own: FunctionType, kernels: Kernels) -> FunctionType | None:
    """The attention class's forward with our rotary function in place of the library's; None if that one computes
    something else.

    A copy with globals of its own: the library's module stays as it is, and with it every other model of this process.
    """
    theirs = own.__globals__[ROTARY_FUNCTION]
    if not _computes_llamas_rotary(theirs):
        return None

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if (unsqueeze_dim != 1 or cos.ndim != 3 or cos.shape[-1] != q.shape[-1] or cos.requires_grad
                or cos.dtype != q.dtype):
            return theirs(q, k, cos, sin, unsqueeze_dim)
        return Rotary.apply(q, cos, sin, kernels), Rotary.apply(k, cos, sin, kernels)

    forward = FunctionType(own.__code__, {**own.__globals__, ROTARY_FUNCTION: rotary}, own.__name__, own.__defaults__,
                           own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


# ------------------------------------------------------------------------------------------- found out on small tensors


def _twin(module: nn.Module, **parts: nn.Module | nn.Parameter) -> nn.Module:
    """A small module of the same class and settings, with some parts replaced: its own may be sharded, or large."""
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        if name not in vars(twin) and name != "forward":
            vars(twin)[name] = value
    for name, part in {**dict(module.named_children()), **parts}.items():
        setattr(twin, name, part)
    return twin


def _agrees(compute: Callable[[], Tensor], wanted: Tensor) -> bool:
    try:
        got = compute()
    except Exception:                    # an unknown module may fail on our small input in any way
        return False
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def _computes_llamas_norm(module: nn.Module) -> bool:
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    if not has_eps or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return False
    x, weight = torch.randn(3, 8), nn.Parameter(torch.randn(8))
    twin = _twin(module, weight=weight)
    return _agrees(lambda: type(module).forward(twin, x), F.rms_norm(x, [8], weight, _eps(module)))


def _computes_swiglu(module: nn.Module) -> bool:
    x, gate, up, down = torch.randn(3, 8), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
    twin = _twin(module, gate_proj=gate, up_proj=up, down_proj=down)
    return _agrees(lambda: type(module).forward(twin, x), down(F.silu(gate(x)) * up(x)))


def _computes_llamas_rotary(function: Any) -> bool:
    if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    q, k, cos, sin = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def wanted(x: Tensor) -> Tensor:
        return x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]

    return all(_agrees(lambda i=i: function(q, k, cos, sin)[i], wanted(x)) for i, x in enumerate((q, k)))  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------- choosing


def choose_kernels(kernels: str, model: PretrainedConfig, dtype: torch.dtype,
                   device: torch.device) -> tuple[bool, str | None]:
    """(whether to fuse, why not although there is a GPU) for a value of model.kernels and a model's config. UserError
    where fused kernels were asked for and do not fit. Call it before any sharded load: it makes small models.
    """
    if kernels == "eager" or (kernels == "auto" and device.type != "cuda"):
        return False, None
    misfit = fused_misfit(model, dtype, device)
    if misfit and kernels == "fused":
        raise UserError(f"model.kernels=fused does not fit this {model.model_type} model here ({misfit}); set "
                        "model.kernels=auto or eager")
    return misfit is None, misfit


def fused_misfit(config: PretrainedConfig, dtype: torch.dtype, device: torch.device,
                 kernels: Kernels | None = None) -> str | None:
    """None where the kernels give this architecture's numbers on this device, else why not; seconds.

    A tiny random model computes hidden states and gradients with and without them: the same to 1e-5 in fp32; in bf16 no
    further from fp32 than 1.5 times the model's own.
    """
    try:
        if kernels is None:
            if device.type != "cuda":
                return "there is no GPU"
            kernels = gpu_kernels()
        truth = _states_and_gradients(config, torch.float32, device, None)
        if not truth[0].isfinite().all():
            return "its hidden states are not finite"
        fused = _states_and_gradients(config, torch.float32, device, kernels)
        if not fused:
            return "none of its norms, activations and rotary embeddings has a kernel"
        if not (error := _error(fused, truth)) <= 1e-5:                     # also where it is NaN
            return f"hidden states and gradients differ by {error:.2g} in fp32"
        if dtype != torch.float32:
            own, ours = (_states_and_gradients(config, dtype, device, k) for k in (None, kernels))
            if not (error := _error(ours, truth)) <= 1.5 * (usual := _error(own, truth)):
                return f"in {dtype} hidden states and gradients are {error:.2g} from fp32, the model's own {usual:.2g}"
    except Exception as problem:                                # a missing library or compiler, a foreign architecture
        return first_line(problem)
    return None


def _states_and_gradients(config: PretrainedConfig, dtype: torch.dtype, device: torch.device,
                          kernels: Kernels | None) -> list[Tensor]:
    """Hidden states and parameters' gradients of the same tiny random model every time; empty if nothing is fused."""
    model = tiny_backbone(config, "eager").train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # values that bf16 holds, so that all dtypes compute the same model
        for parameter in model.parameters():
            parameter.copy_((0.2 * torch.randn(parameter.shape, generator=generator)).bfloat16())
    model = model.to(device, dtype)
    if kernels is not None and not fuse(model, kernels):
        return []
    states = model(input_ids=torch.arange(3, 51, device=device).reshape(2, 24), use_cache=False).last_hidden_state
    upstream = torch.randn(states.shape, generator=generator).to(device, states.dtype)
    (states * upstream).sum().backward()
    return [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _error(ours: list[Tensor], truth: list[Tensor]) -> float:
    """As worst_error, where a tensor's norm counts as at least a thousandth of the largest gradient's."""
    return worst_error(ours, truth, floor=1e-3 * max(t.norm().item() for t in truth[1:]))
