"""Answers sampled from a model, several to each prompt. They are kept block by block as they come, so that a sampling
that was killed goes on where it stopped."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_dist.models.workers import fill, model_of, tokenizer_of
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.terminal import Terminal

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Sampling:
    answers: int = 4                        # to each prompt
    temperature: float = 0.8
    max_new_tokens: int = 80
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    prompt: str
    text: str
    ids: tuple[int, ...]                    # as sampled, without the token that ends it
    ended: bool                             # by itself, before max_new_tokens


def sample(model: Path, prompts: Sequence[str], sampling: Sampling, kept: Path, pool: Executor,
           terminal: Terminal) -> dict[str, list[Answer]]:
    """{prompt: its answers}. What is kept in the folder, of the same model, prompts and sampling, is not sampled again.

    The random numbers depend on the block alone: two models that are asked the same draw with the same ones.
    """
    from dpo_dist.models.digest import model_digest
    from dpo_dist.models.file_digests import tokenizer_digest

    kept.mkdir(parents=True, exist_ok=True)
    by_length = sorted(prompts, key=len)    # so that little is padded
    blocks = [by_length[start:start + PROMPTS_AT_ONCE] for start in range(0, len(by_length), PROMPTS_AT_ONCE)]
    content = model_digest(model), tokenizer_digest(model), asdict(sampling)
    files = [kept / f"{_digest([*content, number, block])}.json" for number, block in enumerate(blocks)]
    tasks = {file: (model, block, sampling, number, file)
             for number, (block, file) in enumerate(zip(blocks, files, strict=True))}
    fill(tasks, sample_block, pool, terminal, f"blocks of {PROMPTS_AT_ONCE} prompts")
    found: dict[str, list[Answer]] = {prompt: [] for prompt in prompts}
    for a in (a for file in files for a in json.loads(file.read_text())):
        found[a["prompt"]].append(Answer(a["prompt"], a["text"], tuple(a["ids"]), a["ended"]))
    return found


def sample_block(model: Path, prompts: list[str], sampling: Sampling, number: int, file: Path) -> None:
    """Writes the answers to these prompts. Each prompt is computed once, for all its answers."""
    import torch

    tokenizer, lm = tokenizer_of(model), model_of(model)
    torch.manual_seed(sampling.seed * 1_000_003 + number)
    inputs = encoded(tokenizer, prompts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        cache = lm(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True,
                   logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(sampling.answers)
        out = lm.generate(ids.repeat_interleave(sampling.answers, 0), past_key_values=cache, do_sample=True, top_k=0,
                          attention_mask=mask.repeat_interleave(sampling.answers, 0), top_p=1.0,
                          temperature=sampling.temperature, max_new_tokens=sampling.max_new_tokens,
                          pad_token_id=tokenizer.pad_token_id)
    asked = [prompt for prompt in prompts for _ in range(sampling.answers)]
    write_json(file, [asdict(answer(tokenizer, prompt, row))
                      for prompt, row in zip(asked, out[:, ids.shape[1]:].tolist(), strict=True)])


def chat(model: Path, prompt: str, max_new_tokens: int) -> str:
    """The answer whose every token is the likeliest, by plain transformers."""
    import torch

    tokenizer, lm = tokenizer_of(model), model_of(model)
    inputs = encoded(tokenizer, [prompt])
    with torch.inference_mode():
        out = lm.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    return answer(tokenizer, prompt, out[0, inputs["input_ids"].shape[1]:].tolist()).text


def encoded(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """input_ids and attention_mask of the prompts as chats, up to where the assistant speaks; padded on the left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True,
                                         padding=True)


def answer(tokenizer: Any, prompt: str, ids: list[int]) -> Answer:
    """Of sampled ids, with what stands behind the end."""
    ended = tokenizer.eos_token_id in ids
    said = ids[:ids.index(tokenizer.eos_token_id)] if ended else ids
    return Answer(prompt, tokenizer.decode(said, skip_special_tokens=True).strip(), tuple(said), ended)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()
