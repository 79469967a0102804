"""What the models think of texts: the likelihood of a neutral text, and the distance between policy and reference."""
from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_dist.models.workers import as_done, model_of, tokenizer_of
from dpo_dist.real.answers import PROMPTS_AT_ONCE, Answer, Sampling, encoded
from dpo_dist.runtime.terminal import Terminal

NEUTRAL = Path(__file__).parent / "neutral.txt"


@dataclass(frozen=True)
class Divergence:
    """KL(policy || reference) in nats, estimated on answers that the policy gave, with standard errors."""

    an_answer: float
    an_answer_error: float
    a_token: float
    answers: int


def neutral_nats(model: Path) -> float:
    """Nats a token of the neutral text, without a chat template, after a BOS where the tokenizer adds one."""
    import torch

    tokenizer, lm = tokenizer_of(model), model_of(model)
    ids = tokenizer(NEUTRAL.read_text(), return_tensors="pt")["input_ids"][:, :lm.config.max_position_embeddings]
    with torch.inference_mode():
        logps = lm(ids).logits[0, :-1].log_softmax(-1)
    return -float(logps.gather(1, ids[0, 1:, None]).mean())


def divergence(policy: Path, reference: Path, answers: dict[str, list[Answer]], sampling: Sampling, pool: Executor,
               terminal: Terminal) -> Divergence:
    """Over these answers, which the policy gave: the mean of their summed log-prob differences, at the temperature at
    which they were sampled, up to max_new_tokens. Its expectation is the KL of the distributions sampled from."""
    prompts = list(answers)
    blocks = [prompts[start:start + PROMPTS_AT_ONCE] for start in range(0, len(prompts), PROMPTS_AT_ONCE)]
    found: list[float] = []
    with terminal.progress(len(blocks), 0, f"blocks of {PROMPTS_AT_ONCE} prompts") as bar:
        tasks = [(policy, reference, {prompt: answers[prompt] for prompt in block}, sampling) for block in blocks]
        for done, differences in enumerate(as_done(pool, compare_block, tasks), 1):
            found += differences
            bar.update(done)
    tokens = sum(len(answer.ids) + answer.ended for given in answers.values() for answer in given)
    return Divergence(statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found)), sum(found) / tokens,
                      len(found))


def compare_block(policy: Path, reference: Path, answers: dict[str, list[Answer]], sampling: Sampling) -> list[float]:
    """log policy - log reference of each answer, in nats."""
    differences: list[float] = []
    for prompt, given in answers.items():
        ours, theirs = (answer_logps(model, prompt, given, sampling.temperature) for model in (policy, reference))
        differences += [a - b for a, b in zip(ours, theirs, strict=True)]
    return differences


def answer_logps(model: Path, prompt: str, answers: Sequence[Answer], temperature: float) -> list[float]:
    """The log-prob of each answer to the prompt, with the token that ends it where it ended by itself."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokenizer, lm = tokenizer_of(model), model_of(model)
    start = encoded(tokenizer, [prompt])["input_ids"][0]
    said = [torch.tensor([*answer.ids, *([tokenizer.eos_token_id] if answer.ended else [])]) for answer in answers]
    ids = pad_sequence([torch.cat([start, one]) for one in said], batch_first=True)     # what is padded comes last
    targets = pad_sequence(said, batch_first=True)
    with torch.inference_mode():
        logits = lm(ids, logits_to_keep=targets.shape[1] + 1).logits[:, :-1]
        logps = (logits / temperature).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return [float(row[:len(one)].double().sum()) for row, one in zip(logps, said, strict=True)]


def as_table(found: Divergence) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(found).items()}
