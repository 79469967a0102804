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
from collections.abc import Iterator
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
from dpo_dist.models.text import empty_lm, has_other_parts, lm_class, text_config
from dpo_dist.models.tiny import MOST_ELEMENTS, backbone_class, keep_a_layer_of_each_kind, shake, shrink
from dpo_dist.types import PackedBatch, TokenizedPair

RESULT = Path(__file__).parent / "results" / "families.json"
FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
LOGP_BOUND, GRADIENT_BOUND = 1e-4, 1e-3            # nats a token, fp32; of a weight's largest gradient
MEMORY_BYTES = 12 << 30                            # some configs' defaults cannot be shrunk
# Prompts of several lengths, longer than the tiny windows; two share one; a completion of one token.
PAIRS = [TokenizedPair(tuple(range(5, 17)), (20, 21, 22, 23, 24, 25, 1), (30, 31, 1), "a"),
         TokenizedPair((40, 41, 42), (41, 42, 1), (1,), "b"),
         TokenizedPair(tuple(range(5, 17)), (30, 31, 1), (50, 51, 52, 53, 54, 1), "c")]
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_HALF_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                      "mrope_section": [1, 1, 0]}}
# What published models of a family say, and its config class by default does not: the layers that make it special, and
# sizes without which none of it can be built.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_vl": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size":
              48, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "hunyuan_vl": {"head_dim": 8},
    "ministral": {"head_dim": 8}, "nemotron": {"head_dim": 8},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), _SECTIONS),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"), _HALF_SECTIONS),
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
    except Exception as problem:                        # of whatever kind
        return {"outcome": "not built", "why": one_line(problem)}
    try:
        attention, why = choose_attention(MODEL, folder)
        model = ScoredModel(load_causal_lm(folder, torch.float32, attention), attention).eval()
        logp, gradient = errors(model)
    except UserError as refusal:
        return {"outcome": "refused", "why": one_line(refusal).replace(str(folder), "the model")}
    except Exception as problem:
        return {"outcome": "wrong", "why": one_line(problem)}
    found = {"attention": attention, **({"why": why} if why else {}), "logp_error": float(f"{logp:.1e}"),
             "gradient_error": float(f"{gradient:.1e}")}
    right = logp < LOGP_BOUND and gradient < GRADIENT_BOUND
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
    if (elements := sum(p.numel() for p in empty.parameters())) > MOST_ELEMENTS:
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
    text = layers_of_each_kind(shrink(config))
    if not has_other_parts(config):
        return text
    name = next(name for name, part in vars(config).items() if part is text_config(config))
    small = copy.deepcopy(config)
    setattr(small, name, text)
    for part in vars(small).values():
        if isinstance(part, PretrainedConfig) and part is not text:
            for key, size in SMALL_TOWER.items():
                if isinstance(getattr(part, key, None), int):
                    with contextlib.suppress(AttributeError):
                        setattr(part, key, size)
            for key in ("out_hidden_size", "text_hidden_size", "output_dim", "projection_dim_text"):
                if getattr(part, key, None) is not None:
                    setattr(part, key, text.hidden_size)
    for key in ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
                "boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index", "vision_start_token_id",
                "vision_end_token_id"):
        if isinstance(getattr(small, key, None), int):
            setattr(small, key, 63)
    return small


SMALL_TOWER = {"depth": 1, "num_hidden_layers": 1, "n_layers": 1, "layers": 1}


def layers_of_each_kind(config: PretrainedConfig) -> PretrainedConfig:
    """The text config with fewer layers where its lists allow it."""
    with torch.device("meta"):
        model = backbone_class(config)._from_config(copy.deepcopy(config))
    before = getattr(config, "num_hidden_layers", None)
    keep_a_layer_of_each_kind(model)
    needed = max((len(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)), default=0)
    if not before or not 0 < needed < before:
        return config
    fewer = copy.deepcopy(config)
    for key, value in list(vars(fewer).items()):
        if isinstance(value, (list, tuple)) and len(value) == before:
            with contextlib.suppress(AttributeError):
                setattr(fewer, key, list(value[:needed]))
    try:
        fewer.num_hidden_layers = needed
        with torch.device("meta"):
            backbone_class(fewer)._from_config(copy.deepcopy(fewer))
    except Exception:                                   # keys that belong together: it stays as deep as it is
        return config
    return fewer


def errors(model: ScoredModel) -> tuple[float, float]:
    """The largest differences between packs (or padded rows) and the model's own forward of each row: of log-probs in
    nats, and of gradients over the largest of their weight."""
    batch = pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    found = token_logps(model, batch).logps
    found.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    wanted = torch.cat([plain_token_logps(model.causal, ids[0], ids[1]) for ids in rows(batch)])
    wanted.sum().backward()
    largest = max(p.grad.abs().max().item() for p in trained.values() if p.grad is not None)
    worst = 0.0
    for name, p in trained.items():
        if (mine := gradients[name]) is None or p.grad is None:
            assert (mine is None or not mine.any()) and (p.grad is None or not p.grad.any()), name
        else:
            worst = max(worst, ((p.grad - mine).abs().max() / max(p.grad.abs().max().item(), 1e-3 * largest)).item())
    return (found - wanted).abs().max().item(), worst


def rows(batch: PackedBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    ids = batch.input_ids[0]
    for tree in batch.trees:
        for branch in tree.branches:
            yield ids[slice(*tree.prompt)], ids[slice(*branch)]


def one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return (text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}")[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
