"""How far the policy is from its reference on answers of its own: KL(policy || reference), estimated from samples."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.data.packing import filled_in_turn
from dpo_dist.models.head import tempered
from dpo_dist.policy import Policy
from dpo_dist.policy.generate import Ids, Sampling
from dpo_dist.reference import ReferenceEngine
from dpo_dist.runtime.world import World
from dpo_dist.stats.intervals import mean_interval
from dpo_dist.types import PackedBatch


def sampled_kl(policy: Policy, reference: ReferenceEngine | None, prompts: Sequence[Ids], completions: Sequence[Ids],
               how: Sampling, padded: bool, world: World) -> dict[str, Any] | None:
    """{"per_answer": the mean of log policy - log reference over the completions, in nats, with its interval and
    standard error, "per_token", "answers", "temperature"}, the same on every rank; all ranks call it.

    Its expectation is the KL divergence of the distributions that are sampled from, at the temperature of the samples
    and up to max_new_tokens. None without a reference that scores new sequences, and at temperature 0: the likeliest
    answers are no samples. padded: a model computes padded rows.
    """
    if not completions or how.temperature == 0 or reference is None:
        return None
    at_temperature = reference.at_temperature(how.temperature)
    if at_temperature is None:
        return None
    mine: dict[int, float] = {}
    with policy.evaluating(), tempered(policy.model, how.temperature), at_temperature:
        for members, kept in _packs(prompts, completions, how.tokens_at_once, padded, world):
            pack = pack_sequences([Sequences(prompts[i], (completions[i],)) for i in members])
            differences = _differences(policy, reference, pack)
            if kept:
                mine |= dict(zip(members, differences, strict=True))
    found = {i: value for part in world.gather(mine) for i, value in part.items()}
    values = np.array([found[i] for i in range(len(completions))])
    per_answer = mean_interval(values)
    assert per_answer is not None
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"per_answer": per_answer.as_dict() | {"standard_error": error},
            "per_token": float(values.sum() / sum(map(len, completions))), "answers": len(values),
            "temperature": how.temperature}


def _differences(policy: Policy, reference: ReferenceEngine, pack: PackedBatch) -> list[float]:
    """log policy - log reference of each sequence of the pack, in nats."""
    ours, theirs = (values.double().cpu() for values in (policy.token_logps(pack).logps, reference.token_logps(pack)))
    return [float(part.sum()) for part in pack.split(ours - theirs)]


def _packs(prompts: Sequence[Ids], completions: Sequence[Ids], tokens_at_once: int, padded: bool,
           world: World) -> list[tuple[list[int], bool]]:
    """(completions of a pack, whether they count) of this rank. A rank with none left forwards the first pack again,
    for the law of equal forwards."""
    sizes = np.array([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    order, ones = np.argsort(-sizes, kind="stable"), np.ones(len(sizes), dtype=np.int64)
    rows, longest = (ones, sizes[order]) if padded else (sizes[order], ones)
    bounds = filled_in_turn(rows, longest, tokens_at_once).tolist()
    packs = [order[start:end].tolist() for start, end in pairwise(bounds)]
    own = range(world.rank, len(packs) + (-len(packs)) % world.size, world.size)
    return [(packs[i], True) if i < len(packs) else (packs[0], False) for i in own]
