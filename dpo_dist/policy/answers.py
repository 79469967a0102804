"""Answers sampled from an exported model, several to each prompt. They are kept block by block as they come, so that a
sampling that was killed goes on where it stopped."""
from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_dist.models.digest import model_digest
from dpo_dist.models.workers import fill, model_of
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, parsed, sealed
from dpo_dist.runtime.terminal import Terminal

Ids = tuple[int, ...]
TOKENS_AT_ONCE = 8192                        # of prompts and answers, in one process


@dataclass(frozen=True)
class Asking:
    """How a prompt is answered."""

    answers: int                             # to each prompt
    temperature: float
    max_new_tokens: int
    seed: int
    stop: Ids                                # an answer ends with one of these tokens, or is cut at max_new_tokens
    dtype: str = "float32"


def sampled(model: Path, prompts: Sequence[Ids], asking: Asking, kept: Path, pool: Executor,
            terminal: Terminal) -> list[list[Ids]]:
    """The answers to each prompt, in turn, with the token that ends them. What the folder `kept` has, of the same
    model, prompts and asking, is not sampled again. An answer depends on its block alone: not on the processes."""
    kept.mkdir(parents=True, exist_ok=True)
    blocks = _blocks(prompts, asking)
    content = [model_digest(model), asdict(asking)]
    names = [hashlib.blake2b(json.dumps([*content, [prompts[i] for i in block]]).encode(), digest_size=12).hexdigest()
             for block in blocks]
    files = [kept / f"{name}.json" for name in names]
    tasks = {file: (model, [prompts[i] for i in block], asking, name, file)
             for block, name, file in zip(blocks, names, files, strict=True)}
    for file in files:
        if found_sealed(file) is None:                   # not there yet, or damaged
            file.unlink(missing_ok=True)
    fill(tasks, sample_block, pool, terminal, "blocks of prompts")
    found: list[list[Ids]] = [[] for _ in prompts]
    for block, file in zip(blocks, files, strict=True):
        for i, answers in zip(block, parsed(file)["answers"], strict=True):
            found[i] = [tuple(ids) for ids in answers]
    return found


def _blocks(prompts: Sequence[Ids], asking: Asking) -> list[list[int]]:
    """Which prompts are answered together: those of one length, so that nothing is padded, whatever the model."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    blocks = []
    for length, members in sorted(by_length.items()):
        most = max(1, TOKENS_AT_ONCE // (asking.answers * (length + asking.max_new_tokens)))
        blocks += [members[start:start + most] for start in range(0, len(members), most)]
    return blocks


def sample_block(model: Path, prompts: list[Ids], asking: Asking, name: str, file: Path) -> None:
    """Writes the answers to these prompts, which are of one length: for each a list of token ids."""
    import torch

    lm = model_of(model, asking.dtype)
    torch.manual_seed(asking.seed + int(name[:12], 16))
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                          temperature=asking.temperature, num_return_sequences=asking.answers,
                          max_new_tokens=asking.max_new_tokens, eos_token_id=list(asking.stop) or None,
                          pad_token_id=asking.stop[0] if asking.stop else 0)
    said = [_until_stop(row, asking.stop) for row in out[:, ids.shape[1]:].tolist()]
    write_json(file, sealed({"answers": [said[at:at + asking.answers] for at in range(0, len(said), asking.answers)]}))


def _until_stop(ids: list[int], stop: Ids) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[:end + 1]
