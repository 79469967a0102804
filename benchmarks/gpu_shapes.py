"""The models of the GPU benchmarks: real shapes, random weights; and what their parts share."""
from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

# hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied: Qwen2.5 0.5B, 1.5B, 3B; Llama 3.1 8B
SHAPES = {"0.5B": (896, 4864, 24, 14, 2, 151_936, True), "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
          "3B": (2048, 11_008, 36, 16, 2, 151_936, True), "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
          "tiny": (64, 128, 2, 4, 2, 512, True)}


def config_of(model: str) -> PretrainedConfig:
    hidden, inner, layers, heads, key_heads, vocabulary, tied = SHAPES[model]
    kind = LlamaConfig if model == "8B" else Qwen2Config
    return kind(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=131_072,
                tie_word_embeddings=tied, pad_token_id=0, bos_token_id=2, eos_token_id=1, use_cache=False)


def write_model(model: str, folder: Path) -> Path:
    """The model's folder, written unless it is there: random bf16 weights, made on the GPU."""
    if not (folder / "written").exists():
        torch.manual_seed(0)
        with torch.device(device()):
            made = AutoModelForCausalLM.from_config(config_of(model),
                                                    dtype=torch.bfloat16 if on_gpu() else torch.float32)
        made.save_pretrained(folder, max_shard_size="5GB")
        (folder / "written").touch()
    return folder


def write_rows(path: Path, model: str, pairs: int, length: int, prompt_share: float) -> list[tuple[int, int, int]]:
    """Pairs whose prompt and chosen completion have `length` tokens together, a share of them the prompt's; the
    rejected completion has between half and all of the chosen one's tokens. Returns the lengths."""
    r, vocabulary, lengths = random.Random(length), SHAPES[model][5], []
    with path.open("w") as f:
        for _ in range(pairs):
            prompt = int(length * prompt_share)
            chosen = length - prompt
            lengths.append((prompt, chosen, r.randint(chosen // 2, chosen)))
            row = {key: [r.randrange(4, vocabulary) for _ in range(n)]
                   for key, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths[-1], strict=True)}
            f.write(json.dumps(row) + "\n")
    return lengths


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda", 0) if on_gpu() else torch.device("cpu")


def median_seconds(work: Callable[[], Any], repeats: int = 10, at_most: float = 2.0) -> float:
    """Of one call, after two that warm up."""
    for _ in range(2):
        work()
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < repeats and sum(seconds) < at_most):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))
