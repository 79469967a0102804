"""Completions that the policy generates as it stands, by transformers' own generation on the live, maybe sharded model.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from dpo_dist.models.load import ScoredModel
from dpo_dist.models.text import backbone, setting, text_config
from dpo_dist.policy import Policy
from dpo_dist.runtime import preemption
from dpo_dist.runtime.watchdog import sign
from dpo_dist.runtime.world import World

Ids = tuple[int, ...]
FORWARDS_BETWEEN_AGREEMENTS = 4          # to stop: a sharded model's may take seconds each
KEPT = "the evaluation is made again"


@dataclass(frozen=True)
class Sampling:
    """How completions are generated: from the model's own distribution, whatever its generation_config.json says."""

    stop: Ids                            # a completion ends with one of these tokens, or at max_new_tokens
    max_new_tokens: int = 256
    temperature: float = 0.0             # 0: the likeliest token each time, the same on any number of ranks
    tokens_at_once: int = 8192           # of prompts and completions that one rank generates together
    seed: int = 0                        # of what is drawn


def generate(policy: Policy, prompts: Sequence[Ids], how: Sampling, world: World) -> list[Ids]:
    """The completion of each prompt, in turn, with the token that ends it, on every rank.

    All ranks call it, with the same prompts; each generates its share. Random states are as before afterwards.
    """
    batches = _batches([len(p) for p in prompts], how, world.size, one_each=policy.model.attention == "padded")
    mine = batches[world.rank::world.size]
    if policy.is_sharded:                # equal forwards: all ranks gather every weight at every token
        mine += [[]] * (-(-len(batches) // world.size) - len(mine))

    forwards = count()

    def look(*_: Any) -> None:
        """Before each forward: whether to stop. Sharded, all ranks make the same forwards."""
        sign()
        if not policy.is_sharded:
            preemption.heed(KEPT)
        elif next(forwards) % FORWARDS_BETWEEN_AGREEMENTS == 0:
            world.heed_signals(KEPT)

    def work() -> dict[int, Ids]:
        with policy.evaluating(), _generating(policy.model, look), torch.random.fork_rng():
            torch.manual_seed(how.seed * world.size + world.rank)
            return {i: ids for batch in mine for i, ids in _generate(policy, prompts, batch, how).items()}

    parts = world.gather(work()) if policy.is_sharded else world.together(work)
    found = {i: ids for part in parts for i, ids in part.items()}
    return [found[i] for i in range(len(prompts))]


def _batches(lengths: Sequence[int], how: Sampling, ranks: int, one_each: bool) -> list[list[int]]:
    """Which prompts are continued together: of about one length, as many as fit, and enough batches for all ranks.
    one_each: models that need padded rows may have a state, which padding on the left would enter."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        most = min(-(-len(lengths) // ranks), how.tokens_at_once // (longest + how.max_new_tokens))
        if batches and len(batches[-1]) < most and not one_each:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _generate(policy: Policy, prompts: Sequence[Ids], batch: Sequence[int], how: Sampling) -> dict[int, Ids]:
    """{prompt: its completion}. An empty batch generates after a filler, and returns nothing."""
    causal = policy.model.causal
    rows = [prompts[i] for i in batch] or [how.stop[:1] or (0,)]
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(rows):
        ids[row, longest - len(prompt):] = torch.tensor(prompt)
        mask[row, longest - len(prompt):] = 1
    positions = setting(text_config(causal.config), "max_position_embeddings")
    new = how.max_new_tokens if positions is None else min(how.max_new_tokens, positions - longest)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    causal.generation_config = GenerationConfig(
        max_new_tokens=new, eos_token_id=list(how.stop) or None, pad_token_id=how.stop[0] if how.stop else 0,
        use_cache=True, **(drawn if how.temperature > 0 else {"do_sample": False}))
    device = policy.model.head.weight.device
    out = causal.generate(input_ids=ids.to(device), attention_mask=mask.to(device), synced_gpus=policy.is_sharded)
    return {i: _until_stop(row, how.stop) for i, row in zip(batch, out[:, longest:].tolist(), strict=False)}


def _until_stop(ids: list[int], stop: Ids) -> Ids:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids) - 1)
    return tuple(ids[:end + 1])


@contextmanager
def _generating(model: ScoredModel, before_forward: Callable[..., None]) -> Iterator[None]:
    """Inside: attention of padded rows and of single tokens after cached ones, which branch attention is not for; the
    model's own settings of generation are put back afterwards."""
    causal = model.causal
    configs = {id(m.config): m.config for m in causal.modules() if isinstance(m, PreTrainedModel)}
    branch = [config for config in configs.values() if config._attn_implementation == "branch"]
    own = causal.generation_config
    looking = causal.register_forward_pre_hook(before_forward)
    try:
        for config in branch:            # the architecture's own choice, as from_pretrained makes it
            config._attn_implementation = "sdpa" if backbone(causal)._supports_sdpa else "eager"
        yield
    finally:
        looking.remove()
        causal.generation_config = own
        for config in branch:
            config._attn_implementation = "branch"
