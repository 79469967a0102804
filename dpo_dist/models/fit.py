"""How a model's sequences are laid out: packed with branch attention, in padded rows, or not at all.

Found by trying on a tiny random model of the architecture, not by its name: attention sinks, chunks, indexers, states
that run through a row, and whatever comes next show as other numbers.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import ModelConfig
from dpo_dist.models.attention import Forest
from dpo_dist.models.folder import read_config
from dpo_dist.models.tiny import tiny_backbone
from dpo_dist.models.trial import first_line
from dpo_dist.types import Span, Tree

# of the largest hidden state: what rounding may change, and what another token must change
SAME, FELT = 1e-3, 1e-3
_IDS = torch.arange(3, 27)
_PROMPT = 10
_ROWS = (_IDS[:18], torch.cat([_IDS[:_PROMPT], _IDS[18:]]))                # the prompt, and one of two completions


def choose_attention(config: ModelConfig, folder: Path) -> tuple[str, str | None]:
    """("branch" or "padded", why not branch). Raises UserError where branch was asked for and is not exact, or where
    padded rows are not either."""
    model = read_config(folder)
    misfit = "it was not asked for" if config.attention == "padded" else branch_misfit(model)
    if misfit is None:
        return "branch", None
    if config.attention == "branch":
        raise UserError(f"model.attention=branch does not fit {config.path} ({misfit}); set model.attention=auto or "
                        "padded")
    if why := padded_misfit(model):
        raise UserError(f"{folder} ({model.model_type}) cannot be trained: {why}. Give a causal language model")
    return "padded", None if config.attention == "padded" else misfit


def branch_misfit(config: PretrainedConfig) -> str | None:
    """None where branch attention is exact for this architecture, else why not: a model with branch attention computes
    two branches packed, and a copy with the architecture's own attention computes each row alone."""
    try:
        own = tiny_backbone(config, "eager")
        error = _error(_packed(tiny_backbone(config, "branch")), torch.cat([_alone(own, _ROWS[0]),
                                                                            _alone(own, _ROWS[1])[_PROMPT:]]))
        felt = _felt(own)
    except Exception as problem:         # an unknown architecture may fail in any way
        return first_line(problem)
    if not error < SAME:
        return f"packed and unpacked hidden states differ by {error:.2g}"
    return None if felt > FELT else "a tiny model of it does not feel other tokens, so nothing can be tried"


def padded_misfit(config: PretrainedConfig) -> str | None:
    """None where what stands behind a sequence changes nothing in it, else what does. An architecture of which no tiny
    model can be made passes: step 0 still compares padded rows with the model's own forward."""
    try:
        own = tiny_backbone(config, "eager")
        rows = (*_ROWS, _IDS)
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        states = own(input_ids=padded, use_cache=False).last_hidden_state
        error = max(_error(found[:len(row)], _alone(own, row)) for found, row in zip(states, rows, strict=True))
    except Exception:                    # as above
        return None
    if error < SAME:
        return None
    return f"hidden states of its tokens change (by {error:.2g}) with what stands behind them, so it is not causal"


@torch.no_grad()
def _packed(model: Any) -> Tensor:
    """The hidden states of the prompt and of both completions, as one pack."""
    tree = Tree(Span(0, 10), (Span(10, 18), Span(18, 24)))
    positions = torch.tensor([*range(10), *range(10, 18), *range(10, 16)])
    return model(input_ids=_IDS[None], position_ids=positions[None], use_cache=False,
                 forest=Forest([tree])).last_hidden_state[0]


@torch.no_grad()
def _alone(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def _felt(model: Any) -> float:
    """How much another token near the prompt's end changes in the completion behind it. Where it changes nothing, a
    leak from one branch to another would not show either."""
    other = _ROWS[0].clone()
    other[_PROMPT - 2] = 60
    return _error(_alone(model, other)[_PROMPT:], _alone(model, _ROWS[0])[_PROMPT:])


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
