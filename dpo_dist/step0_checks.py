"""Before the first update, log-probs are checked; where they are wrong, the run stops and names the pairs."""
from __future__ import annotations

import math

import numpy as np
import torch

from dpo_dist.config.errors import UserError
from dpo_dist.data.pack import pack_pairs
from dpo_dist.data.store import PairStore
from dpo_dist.logps import plain_token_logps, sequence_sums
from dpo_dist.policy import Policy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.runtime.world import World
from dpo_dist.step import StepBatches

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}      # nats a token, mean of |difference| over a completion
PROBED_PAIRS = 3


def check_step_0(policy: Policy, reference: ReferenceEngine | None, step: StepBatches, pair_ids: np.ndarray,
                 pairs: PairStore, dtype: torch.dtype, world: World) -> None:
    """Both checks; `reference` is None where there is none, or where it does not start from the policy's weights."""
    check_packing(policy, pairs, pair_ids, dtype, world)
    if reference is not None:
        check_start(policy, reference, step, pairs, dtype, world)


def check_packing(policy: Policy, pairs: PairStore, pair_ids: np.ndarray, dtype: torch.dtype, world: World) -> None:
    """Raises where a packed, chunked forward and the model's own plain forward disagree on the step's shortest pairs.

    Compares positions, branches, completion mask and head with one sequence after another. Attention was compared
    with the architecture's own before (models/fit.py). Every rank packs all of them and compares its share: under
    ZeRO-3 each forward gathers the whole model. Shares are of one size, so some pairs may be compared twice.
    """
    lengths = pairs.lengths()[pair_ids].sum(1)
    probed = pair_ids[np.argsort(lengths, kind="stable")[:PROBED_PAIRS]].tolist()
    share = math.ceil(len(probed) / world.size)
    batch = pack_pairs([pairs[i] for i in probed], probed, [1.0] * len(probed), share_completions=False)
    errors = []
    with policy.evaluating():
        packed = policy.token_logps(batch).logps
        device = packed.device
        sequence = batch.to(device).sequence
        for k in range(world.rank * share, (world.rank + 1) * share):
            at = k % len(probed)
            pair = pairs[i := probed[at]]
            prompt = torch.tensor(pair.prompt_ids, device=device)
            for slot, ids, counts in ((batch.chosen[at], pair.chosen_ids, pair.chosen_counts),
                                      (batch.rejected[at], pair.rejected_ids, pair.rejected_counts)):
                plain = plain_token_logps(policy.model.causal, prompt, torch.tensor(ids, device=device))
                if counts is not None:
                    plain = plain[torch.tensor(counts, device=device)]
                mine = packed[sequence == int(slot)]
                error = float("inf") if len(mine) != len(plain) else (mine - plain).abs().mean().item()
                errors.append((error, i))
    _refuse(errors, pairs, dtype, world, "the packed forward disagrees with the model's own forward",
            "set model.attention=padded; if that does not help either, this is a fault of dpo-dist: please report it")


def check_start(policy: Policy, reference: ReferenceEngine, step: StepBatches, pairs: PairStore, dtype: torch.dtype,
                world: World) -> None:
    """Raises where policy and reference start from the same weights and a log-prob of the first step still differs."""
    errors: list[tuple[float, int]] = []
    reference.wait_for(step.batches)
    with policy.evaluating():
        for batch, positions in zip(step.batches, step.positions, strict=True):
            tokens = policy.token_logps(batch)
            on_device = batch.to(tokens.logps.device)
            difference = (tokens.logps - reference.token_logps(batch).to(tokens.logps.device)).abs()
            mean = sequence_sums(difference, on_device) / on_device.lengths
            worst = torch.maximum(mean[on_device.chosen], mean[on_device.rejected]).tolist()
            if positions:
                errors += zip(worst, batch.pair_ids, strict=True)
    _refuse(errors, pairs, dtype, world,
            "policy and reference start from the same weights, but their log-probs differ, so the first margins are "
            "not 0",
            "the cached reference values do not belong to these tokens and weights: remove reference.cache_dir, or set "
            "reference.mode=live")


def _refuse(errors: list[tuple[float, int]], pairs: PairStore, dtype: torch.dtype, world: World, what: str,
            remedy: str) -> None:
    """Raises on every rank where one of them found a pair off. errors: this rank's, in nats a token, with the pair."""
    bound = TOLERANCE[dtype]
    everywhere = [one for rank in world.gather(errors) for one in rank]
    bad: dict[int, float] = {}
    for error, i in everywhere:
        if not error <= bound:                                                   # NaN as well
            bad[i] = max(error, bad.get(i, error))
    if bad:
        worst = sorted(bad.items(), key=lambda one: -one[1])[:5]
        checked = len({i for _, i in everywhere})
        names = "; ".join(f"{pairs[i].where}: {error:.4g} nats a token" for i, error in worst)
        raise UserError(f"stopped at step 0: {what}. {len(bad)} of {checked} checked pairs are off by more than "
                        f"{bound} nats a token. Worst: {names}. Remedy: {remedy}")
