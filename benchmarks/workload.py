"""What every benchmark computes: a tiny Llama and two sets of token rows, the same for each trainer."""
from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

VOCABULARY = 4096
# long: prompts of 256 tokens, completions 64 to 128. uneven: 8 to 32, completions 8 to 256. ratings: as long, but four
# responses to a prompt, and all six pairs of them in a step.
PAIRS_PER_STEP = {"long": 2, "uneven": 4, "ratings": 6}


def write_rows(path: Path, kind: str, n: int, vocabulary: int = VOCABULARY, seed: int = 1) -> None:
    """Writes n token_ids rows (of ratings, whole prompts), JSON Lines; every completion ends with token 1."""
    r = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [r.randint(4, vocabulary - 1) for _ in range(length)]

    def uneven() -> int:
        return int(min(256, max(8, r.lognormvariate(4.0, 0.9))))

    with path.open("w") as f:
        for _ in range(n // 6 if kind == "ratings" else 0):
            prompt, answers = ids(256), [[*ids(r.randint(63, 127)), 1] for _ in range(4)]
            for better, worse in combinations(answers, 2):
                f.write(json.dumps({"prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse}) + "\n")
        for _ in range(0 if kind == "ratings" else n):
            if kind == "long":
                prompt, chosen, rejected = 256, r.randint(64, 128), r.randint(64, 128)
            else:
                prompt, chosen, rejected = r.randint(8, 32), uneven(), uneven()
            row = {"prompt_ids": ids(prompt), "chosen_ids": [*ids(chosen - 1), 1],
                   "rejected_ids": [*ids(rejected - 1), 1]}
            f.write(json.dumps(row) + "\n")


def write_model(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """Llama: hidden 256, 4 layers, untied embeddings; 5.3 million parameters at V = 4096."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=2, eos_token_id=1,
        pad_token_id=0)).save_pretrained(folder)
