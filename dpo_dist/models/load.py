"""Loads models from disk or the hub cache; ScoredModel: a causal LM that returns log-probs of a pack."""
from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig, ModelConfig
from dpo_dist.models.attention import Forest, branch_misfit
from dpo_dist.models.fused import fuse
from dpo_dist.models.head import LogpHead
from dpo_dist.models.hub import hub_folder
from dpo_dist.types import PackedBatch, TokenLogps


class ScoredModel(nn.Module):
    """A causal LM whose forward takes a PackedBatch and returns (logps (N,), log_collision (N,) or empty)."""

    def __init__(self, lm: nn.Module, attention: str):
        super().__init__()
        self.lm: Any = lm                                     # a transformers model, or a peft model around one
        self.attention = attention
        causal = self.causal
        head = causal.get_output_embeddings()
        names = [name for name, child in causal.named_children() if child is head]
        if not names:
            raise UserError(f"model.path: {type(causal).__name__} has no output head of its own; choose a causal "
                            "language model")
        self._head_name = names[0]
        if hasattr(head, "base_layer"):
            raise UserError(f"model.lora.target_modules names the output head '{self._head_name}', which cannot have "
                            "adapters here; leave it out")
        setattr(causal, self._head_name, LogpHead(head, *_head_numerics(causal.config)))

    @property
    def causal(self) -> Any:
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def forward(self, batch: PackedBatch, collision: bool = False) -> tuple[Tensor, Tensor]:
        return self.head(self.hidden(batch), batch.targets, collision)

    @property
    def head(self) -> LogpHead:
        return getattr(self.causal, self._head_name)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(N, hidden size): the last hidden state that predicts each counted token."""
        return self._branch_hidden(batch) if self.attention == "branch" else self._padded_hidden(batch)

    def _branch_hidden(self, batch: PackedBatch) -> Tensor:
        out = self.causal.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
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
        hidden = self.causal.base_model(input_ids=padded, use_cache=False).last_hidden_state
        return hidden[batch.sequence, prompts[batch.sequence] - 1 + batch.offset]


def token_logps(model: nn.Module, batch: PackedBatch, collision: bool = False) -> TokenLogps:
    """TokenLogps of a pack by a ScoredModel, or by an engine that wraps one."""
    logps, log_collision = model(batch, collision)
    return TokenLogps(logps, log_collision if collision else None)


def _head_numerics(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) of the final logits: Granite divides, Cohere multiplies, Gemma bounds."""
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


# ------------------------------------------------------------------------------------------------------------ from disk


def resolve(path: str, key: str, offline: bool) -> Path:
    """The local folder of a model given as a folder or a hub name. Raises UserError naming `key`."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{key}={path} has no config.json; give the folder of a transformers model")
        return folder
    return hub_folder(path, key, offline, ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])


def torch_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The weights' dtype: as configured, or bf16 on a GPU and fp32 on a CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]


def read_config(folder: Path) -> Any:
    """The transformers config in a model's folder. UserError where transformers does not know what it is."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json is not a model that transformers knows: "
                        f"{str(error).splitlines()[0]}") from error


def quantization(config: Any) -> str | None:
    """How a model's weights are quantized ("bitsandbytes, 4 bits"), or None; from config.json's quantization_config."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return None
    how = how if isinstance(how, dict) else how.to_dict()
    bits = how.get("bits") or (4 if how.get("load_in_4bit") else 8 if how.get("load_in_8bit") else None)
    return f"{how.get('quant_method', 'unnamed method')}, {f'{bits} bits' if bits else 'see config.json'}"


def check_quantized(config: Any, key: str) -> None:
    """UserError where what a quantized model needs (a library, a GPU) is not here."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).validate_environment()
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"{key} is quantized ({quantization(config)}) and cannot be computed here: "
                        f"{str(error).splitlines()[0]}") from error


def choose_attention(config: ModelConfig, folder: Path) -> tuple[str, str | None]:
    """("branch" or "padded", why not branch). Raises UserError where branch was asked for and is not exact."""
    if config.attention == "padded":
        return "padded", None
    misfit = branch_misfit(read_config(folder))
    if misfit and config.attention == "branch":
        raise UserError(f"model.attention=branch does not fit {config.path} ({misfit}); set model.attention=auto or "
                        "padded")
    return ("padded", misfit) if misfit else ("branch", None)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights in a model's files. Loaded in it, weights stay in the files, mapped page by page."""
    bytes_of: dict[torch.dtype, int] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as f:
            names = f.keys()
            for tensor in map(f.get_tensor, names):
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def _weight_files(folder: Path) -> list[Path]:
    """The model's *.safetensors. UserError where there are none."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors; convert the weights (save_pretrained writes safetensors)")
    return files


def load_causal_lm(folder: Path, dtype: torch.dtype, attention: str, fused: bool = False) -> PreTrainedModel:
    """The model with its weights in `dtype`; sharded over the ranks where an HfDeepSpeedConfig for ZeRO-3 is alive.
    fused: with one kernel each for norms, rotary embedding and SwiGLU (fused.choose_kernels)."""
    _weight_files(folder)

    def load(implementation: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation,
                                                    use_safetensors=True, local_files_only=True)

    if attention == "branch":
        model = load("branch")
    else:
        try:
            model = load("sdpa")
        except ValueError:                               # the architecture has no sdpa attention
            model = load("eager")
    _without_dropout(model)
    model.config.use_cache = False
    if fused:
        fuse(model)
    return model


@contextmanager
def sharded_load(config: dict[str, Any]) -> Iterator[None]:
    """Inside, models are loaded as this DeepSpeed configuration says: with ZeRO-3 no rank ever holds a whole one."""
    alive = HfDeepSpeedConfig(config)                    # transformers looks at it as long as it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def release_memory(device: torch.device) -> None:
    """Gives back the memory of models that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _without_dropout(model: PreTrainedModel) -> None:
    """Switches off dropout (layers, and rates that forwards read) and the noise on what routers of experts see,
    whatever the config says: log-probs of one model are one set of numbers."""
    for owner in (*model.modules(), model.config):
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        for name, value in vars(owner).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(owner, name, 0.0)


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> nn.Module:
    """The model with fresh adapters (peft; B = 0, so that it starts as the base) and its own weights frozen."""
    import peft

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    torch.manual_seed(seed)                              # the same adapters on every rank
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha or 2 * lora.rank, target_modules=targets, task_type="CAUSAL_LM"),
                                      autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={lora.target_modules}: {error}") from error
    for name, module in adapted.named_modules():
        is_embedding = bool(getattr(module, "lora_embedding_A", None))
        if is_embedding or (hasattr(module, "base_layer") and not hasattr(module.base_layer, "weight")):
            raise UserError(f"model.lora.target_modules={lora.target_modules} names '{name}', which is no linear "
                            "layer; name linear layers")
    return adapted
