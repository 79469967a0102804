"""What a model does around its output head: it may scale the last hidden state or the logits, and bound these."""
from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo_dist.config.errors import UserError
from dpo_dist.models.sharded import apart_from_sharding
from dpo_dist.models.text import backbone, empty_lm, output_head, setting, text_config

_SMALL, _LARGE = 1e-5, 1e9                               # where a bound does not show yet, and where it is reached
_BETWEEN = (-40.0, -3.0, 0.7, 20.0)


# What configs call the number that final logits are multiplied with, divided by, and bounded by.
_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
_BOUNDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_known: dict[str, tuple[float, float | None]] = {}       # by the config's content


def final_logits(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) of the final logits, softcap · tanh(scale · x / softcap) of the head's output x: Granite
    divides, Cohere multiplies, Gemma bounds. UserError where a model does something else.

    Measured, as one name may mean to multiply here and to divide there, and a text-and-image model may leave out what
    its language model does: the model's own forward runs without its layers, and with a head that hands on what it is
    given. Where that fails, by the config's names; step 0 compares log-probs with the model's own forward in any case.
    """
    content = config.to_json_string(use_diff=False)
    if content not in _known:
        named = _as_named(text_config(config))
        try:
            measured = _measure(config)
        except UserError:
            raise
        except Exception:                                # a forward that looks at values, of which there are none
            measured = named
        # the number itself, where it is only rounded by measuring
        _known[content] = named if _alike(measured, named) else measured
    return _known[content]


def _alike(one: tuple[float, float | None], other: tuple[float, float | None]) -> bool:
    return all(math.isclose(a or math.inf, b or math.inf, rel_tol=1e-6) for a, b in zip(one, other, strict=True))


def _as_named(config: Any) -> tuple[float, float | None]:
    scale = 1.0
    for key in (*_MULTIPLIES, *_DIVIDES):
        value = setting(config, key)
        if isinstance(value, (int, float)) and value:
            scale *= 1 / value if key in _DIVIDES else value
    return float(scale), next((cap for key in _BOUNDS if (cap := setting(config, key))), None)


def _measure(config: PretrainedConfig) -> tuple[float, float | None]:
    given = torch.tensor([_SMALL, _LARGE, *_BETWEEN], dtype=torch.float64)
    small, large, *between = _logits_of(config, given).tolist()
    scale = small / _SMALL
    softcap = None if abs(large / _LARGE / scale - 1) < 1e-6 else large
    wanted = given[2:] * scale if softcap is None else softcap * torch.tanh(given[2:] * scale / softcap)
    if not torch.allclose(torch.tensor(between, dtype=torch.float64), wanted, rtol=1e-5, atol=1e-6):
        raise UserError(f"a {config.model_type} does more to its final logits than to scale and bound them, which "
                        "log-probs are not computed with here; choose another model")
    return scale, softcap


class _Output(BaseModelOutputWithPast):
    """Of a backbone that was not run: nothing but last hidden states."""

    def __getattr__(self, name: str) -> None:
        return None


def _logits_of(config: PretrainedConfig, hidden: Tensor) -> Tensor:
    """The model's final logits, given last hidden states (N,) that its head hands on."""
    lm = empty_lm(config).eval()
    states = hidden[None, :, None]                       # (1, N tokens, hidden size 1)

    def not_run(self: Any, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=states)

    def hands_on(self: Any, x: Tensor) -> Tensor:
        return x

    text, head = backbone(lm), output_head(lm)
    vars(text)["forward"], vars(head)["forward"] = MethodType(not_run, text), MethodType(hands_on, head)
    with apart_from_sharding(), torch.no_grad():
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device="meta")
        return lm(input_ids=ids, use_cache=False).logits[0, :, 0]
