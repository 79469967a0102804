"""Every family of language models that transformers has, as a tiny random model that is saved, loaded as a run loads
it, and trained on: are packed (or padded) log-probs and gradients those of the model's own forward, one row at a time?

    python benchmarks/families.py [FAMILY ...]      writes results/families.json; with names, prints them only
"""
from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig, ModelConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.logps import plain_token_logps
from dpo_dist.models.fit import choose_attention
from dpo_dist.models.load import ScoredModel, load_causal_lm, token_logps
from dpo_dist.models.text import empty_lm, lm_class, text_config, text_part
from dpo_dist.models.tiny import MOST_ELEMENTS, backbone_class, keep_a_layer_of_each_kind, shake, shrink
from dpo_dist.types import TokenizedPair

RESULT = Path(__file__).parent / "results" / "families.json"
FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
# Nats a token, and of a weight's largest gradient, in fp64, of which most families compute norms and softmax in fp32. A
# mask that leaks shows as a tenth and more.
LOGP_BOUND, GRADIENT_BOUND = 1e-5, 1e-3
MEMORY_BYTES = 12 << 30                            # some configs' defaults cannot be shrunk
# Prompts of several lengths, longer than the tiny windows; two share one; a completion of one token.
PAIRS = [TokenizedPair(tuple(range(5, 17)), (20, 21, 22, 23, 24, 25, 1), (30, 31, 1), "a"),
         TokenizedPair((40, 41, 42), (41, 42, 1), (1,), "b"),
         TokenizedPair(tuple(range(5, 17)), (30, 31, 1), (50, 51, 52, 53, 54, 1), "c")]
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}}
_HALF_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                      "mrope_section": [8, 12, 12]}}
_MIXED = {"layer_types": ["conv", "full_attention"] * 16}
# What published models of a family say, and its config class by default does not: the layers that make it special, and
# sizes without which none of it can be built.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    **dict.fromkeys(("lfm2", "lfm2_vl", "lfm2_moe"), _MIXED),
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
              "moe_intermediate_size": 48, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
    **{key: {"head_dim": 8} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "ministral")},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 8},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), _SECTIONS),
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _HALF_SECTIONS), "glm4v_moe": {**_HALF_SECTIONS, "head_dim": 128},
    "glm_ocr": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}},
}


def main(names: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    started, results = time.monotonic(), {}
    for family in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            results[family] = outcome(family, Path(folder))
        print(family, json.dumps(results[family]), flush=True)
    if not names:
        counted = {kind: sum(r["outcome"] == kind for r in results.values())
                   for kind in ("packed", "padded", "refused", "not built", "wrong")}
        RESULT.write_text(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__,
                                      "seconds": round(time.monotonic() - started), "counted": counted,
                                      "families": results}, indent=1) + "\n")


def outcome(family: str, folder: Path) -> dict[str, Any]:
    """What becomes of a family: packed or padded (with the largest errors), refused (and the message), not built (and
    why no tiny model of it can be made here), or wrong (of which there must be none)."""
    try:
        config = published(family)
        if not config.is_encoder_decoder:
            save_tiny(config, folder)
        else:
            config.save_pretrained(folder)
            (folder / "model.safetensors").touch()
    except UserError as refusal:
        return {"outcome": "refused", "why": one_line(refusal)}
    except Exception as problem:                        # of whatever kind
        return {"outcome": "not built", "why": one_line(problem)}
    try:
        attention, why = choose_attention(MODEL, folder)
        for dtype in (torch.float64, torch.float32):     # some mix dtypes of their own, and fail in fp64
            model = ScoredModel(load_causal_lm(folder, dtype, attention), attention).eval()
            try:
                plain(model)
            except Exception as problem:
                failure = one_line(problem)
            else:
                break
        else:
            return {"outcome": "not built", "why": f"its own forward fails on a row of ids: {failure}"}
        logp, gradient = errors(model)
    except UserError as refusal:
        why = one_line(refusal).replace(str(folder), "the model")
        if "weight files of the model" in why:           # this tiny config is another after it was saved and read
            return {"outcome": "not built", "why": why}
        return {"outcome": "refused", "why": why}
    except Exception as problem:
        return {"outcome": "wrong", "why": one_line(problem)}
    found = {**({"why": why} if why else {}), "dtype": str(dtype).removeprefix("torch."),
             "logp_error": float(f"{logp:.1e}"), "gradient_error": float(f"{gradient:.1e}")}
    loose = 1 if dtype == torch.float64 else 100
    right = logp < loose * LOGP_BOUND and gradient < loose * GRADIENT_BOUND
    kind = {"branch": "packed", "padded": "padded"}[attention]
    return {"outcome": kind if right else "wrong", **found}


MODEL = ModelConfig("model", "fp32", "auto", False, False, LoraConfig(0, None, "all-linear"))


def published(family: str) -> PretrainedConfig:
    """The family's config by default, with what AS_PUBLISHED adds to its text part."""
    config = CONFIG_MAPPING[family]()
    for key, value in AS_PUBLISHED.get(family, {}).items():
        setattr(text_config(config), key, copy.deepcopy(value))
    return config


def save_tiny(config: PretrainedConfig, folder: Path) -> None:
    """Saves a tiny random model of the family. ValueError where its sizes cannot be shrunk."""
    small = whole(config)
    empty = empty_lm(small)
    if (elements := sum(p.numel() for p in empty.parameters())) > 2 * MOST_ELEMENTS:
        raise ValueError(f"its sizes cannot be shrunk (a tiny model would have {elements:,} parameters)")
    torch.manual_seed(0)
    model = lm_class(small)(small)
    with torch.no_grad():
        for parameter in model.parameters():
            shake(parameter)
    model.tie_weights()
    model.save_pretrained(folder)


def whole(config: PretrainedConfig) -> PretrainedConfig:
    """The config with a text part that is tiny, of as few layers as have every kind of it, and other parts of one
    layer."""
    text = layers_of_each_kind(shrink(config), backbone_class(config))
    name = text_part(config)
    if name is None:
        return text
    for sizes in (TINY_TOWER, SHALLOW_TOWER):
        small = copy.deepcopy(config)
        setattr(small, name, text)
        for key, part in vars(small).items():
            if isinstance(part, PretrainedConfig) and key != name:
                shrink_tower(part, {**sizes, **dict.fromkeys(INTO_TEXT, text.hidden_size)})
        for key in (key for key in vars(small) if key.endswith(("_token_id", "_token_index"))):
            if isinstance(getattr(small, key), int):
                setattr(small, key, text.vocab_size - 1)
        with contextlib.suppress(Exception):            # sizes that do not fit together: the tower keeps its widths
            empty_lm(small)
            return small
    return small


SHALLOW_TOWER = {"depth": 1, "num_hidden_layers": 1, "n_layers": 1, "layers": 1, "encoder_layers": 1}
TINY_TOWER = {**SHALLOW_TOWER, "hidden_size": 64, "embed_dim": 64, "d_model": 64, "intermediate_size": 64,
              "num_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
INTO_TEXT = ("out_hidden_size", "text_hidden_size")


def shrink_tower(part: PretrainedConfig, sizes: dict[str, int]) -> None:
    layers = getattr(part, "num_hidden_layers", None)
    for key, value in list(vars(part).items()):
        if isinstance(value, (list, tuple)) and len(value) == layers:
            setattr(part, key, list(value[:1]))
        elif isinstance(value, int) and key in sizes:
            setattr(part, key, sizes[key])


def layers_of_each_kind(config: PretrainedConfig, model_class: Any) -> PretrainedConfig:
    """The text config with fewer layers where its lists allow it."""
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config))
    before = getattr(config, "num_hidden_layers", None)
    keep_a_layer_of_each_kind(model)
    needed = max((len(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)), default=0)
    if not before or not 0 < needed < before:
        return config
    fewer = copy.deepcopy(config)
    try:
        for key, value in list(vars(fewer).items()):
            if isinstance(value, (list, tuple)) and len(value) == before:
                setattr(fewer, key, list(value[:needed]))
        fewer.num_hidden_layers = needed
        with torch.device("meta"):
            model_class._from_config(type(fewer).from_dict(fewer.to_dict()))
    except Exception:                                   # keys that belong together: it stays as deep as it is
        return config
    return fewer


def errors(model: ScoredModel) -> tuple[float, float]:
    """The largest differences between packs (or padded rows) and the model's own forward of each row: of log-probs in
    nats, and of gradients over the largest of their weight."""
    found = token_logps(model, pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)).logps
    found.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    wanted = plain(model)
    wanted.sum().backward()
    largest = max(p.grad.abs().max().item() for p in trained.values() if p.grad is not None)
    worst = 0.0
    for name, p in trained.items():
        if (mine := gradients[name]) is None or p.grad is None:
            assert (mine is None or not mine.any()) and (p.grad is None or not p.grad.any()), name
        else:
            worst = max(worst, ((p.grad - mine).abs().max() / max(p.grad.abs().max().item(), 1e-3 * largest)).item())
    return (found - wanted).abs().max().item(), worst


def plain(model: ScoredModel) -> torch.Tensor:
    """The log-probs by the model's own forward, one row after another."""
    batch = pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    ids = batch.input_ids[0]
    return torch.cat([plain_token_logps(model.causal, ids[slice(*tree.prompt)], ids[slice(*branch)])
                      for tree in batch.trees for branch in tree.branches])


def one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return (text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}")[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
