"""Loads models from a folder; ScoredModel: a causal LM that returns log-probs of a pack."""
from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import ModelConfig
from dpo_dist.models import quantized
from dpo_dist.models.attention import Forest
from dpo_dist.models.final_logits import final_logits
from dpo_dist.models.folder import read_config, weight_files
from dpo_dist.models.fused import fuse
from dpo_dist.models.head import LogpHead
from dpo_dist.models.text import (
    backbone,
    freeze_other_parts,
    head_name,
    lm_class,
    text_part,
    weights_between,
)
from dpo_dist.types import PackedBatch, TokenLogps


class ScoredModel(nn.Module):
    """A causal LM whose forward takes a PackedBatch and returns (logps (N,), log_collision (N,) or empty)."""

    def __init__(self, lm: nn.Module, attention: str):
        super().__init__()
        self.lm: Any = lm                                     # a transformers model, or a peft model around one
        self.attention = attention
        causal = self.causal
        name = head_name(causal)
        if name is None:
            raise UserError(f"model.path: {type(causal).__name__} has no output head of its own; choose a causal "
                            "language model")
        if between := weights_between(causal):
            raise UserError(f"model.path: between its layers and its output head a {type(causal).__name__} has weights "
                            f"({between[0]}) that log-probs are not computed with here; choose another model")
        self._head_name = name
        _replace_head(causal, name, final_logits(causal.config))

    @property
    def causal(self) -> Any:
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def forward(self, batch: PackedBatch, collision: bool = False) -> tuple[Tensor, Tensor]:
        return self.head(self.hidden(batch), batch.targets, collision)

    @property
    def head(self) -> Any:
        """The LogpHead; where adapters bring heads of their own, what chooses among them."""
        return self.causal.get_submodule(self._head_name)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(N, hidden size): the last hidden state that predicts each counted token."""
        return self._branch_hidden(batch) if self.attention == "branch" else self._padded_hidden(batch)

    def _branch_hidden(self, batch: PackedBatch) -> Tensor:
        out = backbone(self.causal)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                                    forest=Forest(batch.trees))
        return out.last_hidden_state[0][batch.predict_at]

    def _padded_hidden(self, batch: PackedBatch) -> Tensor:
        """Each sequence in its own row, padded on the right, where causal attention never looks. The plan of the packs
        bounds rows times the longest."""
        ids = batch.input_ids[0]
        rows = [torch.cat([ids[prompt], ids[completion]]) for prompt, completion in batch.slices()]
        prompts = torch.tensor([t.prompt.end - t.prompt.start for t in batch.trees for _ in t.branches],
                               device=batch.offset.device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = backbone(self.causal)(input_ids=padded, use_cache=False).last_hidden_state
        return hidden[batch.sequence, prompts[batch.sequence] - 1 + batch.offset]


def _replace_head(causal: Any, name: str, logits: tuple[float, float | None]) -> None:
    """Puts a LogpHead in the output head's place, and of each copy that an adapter trains (peft's modules_to_save)."""
    head = causal.get_submodule(name)
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        parent, _, own = name.rpartition(".")
        setattr(causal.get_submodule(parent), own, LogpHead(head, *logits))
    else:
        head.original_module = LogpHead(head.original_module, *logits)
        for adapter, copy in list(copies.items()):
            copies[adapter] = LogpHead(copy, *logits)


def token_logps(model: nn.Module, batch: PackedBatch, collision: bool = False) -> TokenLogps:
    """TokenLogps of a pack by a ScoredModel, or by an engine that wraps one."""
    logps, log_collision = model(batch, collision)
    return TokenLogps(logps, log_collision if collision else None)


# ------------------------------------------------------------------------------------------------------------ from disk


def torch_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The weights' dtype: as configured, or bf16 on a GPU and fp32 on a CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]


def load_causal_lm(folder: Path, dtype: torch.dtype, attention: str, fused: bool = False,
                   quantization: str = "none") -> PreTrainedModel:
    """The model with its weights in `dtype`, of which text rows train what is not frozen; sharded over the ranks where
    an HfDeepSpeedConfig for ZeRO-3 is alive. UserError where the files are not the weights of this config.
    fused: with one kernel each for norms, rotary embedding and SwiGLU (fused.choose_kernels). quantization: as
    model.quantization."""
    weight_files(folder)
    config = read_config(folder)
    bits = quantized.loading(config, quantization, dtype)

    def load(implementation: str) -> PreTrainedModel:
        part = text_part(config)                         # what sees images keeps its own attention
        try:
            model, found = lm_class(config).from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=False,
                attn_implementation=implementation if part is None else {part: implementation},
                output_loading_info=True, **bits)
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise UserError(f"the weight files of {folder} hold other sizes than its config.json says (which, stands "
                            "in the report above, and in the logs); give the config.json that belongs to them"
                            ) from error
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"the weight files of {folder} lack {len(missing)} weights of a {type(model).__name__}, "
                            f"which would be random: {', '.join(missing[:3])}; copy the model again, or correct "
                            "config.json")
        return model

    if attention == "branch":
        model = load("branch")
    else:
        try:
            model = load("sdpa")
        except ValueError:                               # the architecture has no sdpa attention
            model = load("eager")
    quantized.settle(model, dtype)
    _without_dropout(model)
    model.config.use_cache = False
    freeze_other_parts(model)
    if fused:
        fuse(model)
    return model


def release_memory(device: torch.device) -> None:
    """Gives back the memory of models that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _without_dropout(model: PreTrainedModel) -> None:
    """Switches off dropout (layers, and rates that forwards read) and the noise on what routers of experts see,
    whatever the config says: log-probs of one model are one set of numbers."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for owner in (*model.modules(), *configs.values()):
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        for name, value in vars(owner).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(owner, name, 0.0)
