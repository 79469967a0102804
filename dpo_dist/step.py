"""One optimizer step, or one evaluation: packs → log-probs → loss → gradients (the law: every pair weighs the same)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.config.schema import LossConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.data.packing import distinct_flops, plan_step
from dpo_dist.data.store import PairStore
from dpo_dist.data.units import PairShapes
from dpo_dist.dynamics.record import VisitLog
from dpo_dist.logps import pair_logps
from dpo_dist.losses import preference_loss
from dpo_dist.policy import Policy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.watchdog import sign
from dpo_dist.runtime.world import World
from dpo_dist.sizing.flops import Flops, StepWork
from dpo_dist.types import PackedBatch, PairLogps, TokenizedPair

PER_PAIR = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_tokens",
            "rejected_tokens", "strength", "wpo_weight", "kl_per_token", "chosen_drift_per_token", "tie")


@dataclass(frozen=True)
class StepBatches:
    """A rank's packs of one step, and facts of the whole step that follow from the data: no rank has to ask another."""

    batches: tuple[PackedBatch, ...]
    positions: tuple[tuple[int, ...], ...]       # of each pack's pairs in the step; empty for a filler
    total_weight: float
    mean_chosen_tokens: float
    work: StepWork                               # of all ranks, forward and backward


def step_batches(pairs: PairStore, pair_ids: np.ndarray, loss: LossConfig, world: World, tokens_per_microbatch: int,
                 flops: Flops, reference: ReferenceEngine | None = None) -> StepBatches:
    """This rank's packs of the step made of `pair_ids`, with the reference's values where it has them at hand; `flops`
    are of a forward and backward (or whatever is to be counted)."""
    shapes = pairs.shapes(pair_ids)
    if not loss.uses_rejected:                           # the shapes of pairs as `_computed` makes them
        shapes = PairShapes(shapes.lengths[:, [0, 1, 1]], shapes.content[:, [0, 1, 1]])
    weights = np.asarray(pairs.weight[pair_ids], dtype=np.float64)
    share = loss.ld_alpha is None
    plan = plan_step(shapes, flops, world.size, tokens_per_microbatch, share)
    batches, positions = [], []
    for members, is_filler in plan.of_rank(world.rank):
        at = [int(pair_ids[m]) for m in members]
        weight = [0.0] * len(members) if is_filler else [float(weights[m]) for m in members]
        batch = pack_pairs([_computed(pairs[i], loss) for i in at], at, weight, share_completions=share)
        if reference is not None:
            batch = replace(batch, reference=reference.look_up(batch))
        batches.append(batch.pinned() if world.device.type == "cuda" else batch)
        positions.append(() if is_filler else members)
    mean_chosen_tokens = float(np.average(pairs.counted()[pair_ids, 0], weights=weights))
    work = StepWork(len(pair_ids), plan.tokens, distinct_flops(shapes, flops))
    return StepBatches(tuple(batches), tuple(positions), float(weights.sum()), mean_chosen_tokens, work)


def _computed(pair: TokenizedPair, loss: LossConfig) -> TokenizedPair:
    """The pair as the loss sees it. If that ignores the rejected completion, the chosen one stands twice."""
    return (pair if loss.uses_rejected
            else replace(pair, rejected_ids=pair.chosen_ids, rejected_counts=pair.chosen_counts))


def forward_pairs(policy: Policy, reference: ReferenceEngine | None, batch: PackedBatch, loss: LossConfig,
                  mean_chosen_tokens: float, device: torch.device) -> tuple[PairLogps, Tensor]:
    """(PairLogps, the pairs' weights) of one pack. It is copied to the device once, before the forward."""
    sign()
    on_device = batch.to(device)
    tokens = policy.token_logps(on_device, collision=bool(loss.wpo))
    values = on_device.reference
    if values is None and reference is not None:
        values = reference.token_logps(batch).to(device, non_blocking=True)
    return pair_logps(on_device, tokens, values, loss, mean_chosen_tokens), on_device.weight.double()


def train_step(policy: Policy, reference: ReferenceEngine | None, step: StepBatches, loss: LossConfig, sums: MetricSums,
               world: World, clock: Clock, visits: VisitLog | None = None) -> Tensor:
    """Adds the step's gradient to the policy, its figures to `sums` and its pairs' rewards to `visits`; this rank's
    part of the step's loss, a scalar.

    The reference's values are there: the caller has waited for them (ReferenceEngine.wait_for).
    """
    slopes = _whole_step_slopes(policy, reference, step, loss, world) if loss.needs_whole_step else None
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i, batch in enumerate(step.batches):
        pairs, weight = forward_pairs(policy, reference, batch, loss, step.mean_chosen_tokens, world.device)
        if slopes is None:
            per_pair = preference_loss(pairs, loss)
            share = (per_pair * weight).sum() / step.total_weight
            total += share.detach()
            sums.add(pairs, per_pair, weight)
        else:
            per_pair, chosen_slope, rejected_slope = (values[list(step.positions[i])].to(world.device)
                                                      for values in slopes)
            share = _linear(pairs, chosen_slope, rejected_slope)
            total += per_pair.sum() / step.total_weight
            if step.positions[i]:
                sums.add(pairs, per_pair, weight)
        if visits is not None and step.positions[i]:
            visits.see(batch.pair_ids, pairs)
        clock.mark("forward")
        policy.backward(share, is_last=i == len(step.batches) - 1)
        clock.mark("backward")
    return total


def _linear(pairs: PairLogps, chosen_slope: Tensor, rejected_slope: Tensor) -> Tensor:
    """A scalar that has the gradient of the whole step's loss, whose slopes are given. For a filler, which has none: 0
    times its log-probs, so that backward runs there too."""
    if not len(chosen_slope):
        return 0.0 * (pairs.policy_chosen.sum() + pairs.policy_rejected.sum())
    return (pairs.policy_chosen * chosen_slope).sum() + (pairs.policy_rejected * rejected_slope).sum()


def _whole_step_slopes(policy: Policy, reference: ReferenceEngine | None, step: StepBatches, loss: LossConfig,
                       world: World) -> tuple[Tensor, Tensor, Tensor]:
    """For losses that sort over the step: (per-pair loss, d loss / d chosen, d loss / d rejected), each (P,), in step
    order.

    A first forward without gradient finds every pair's log-probs; the loss of them all gives each pair's slope; the
    second forward then needs only those numbers. One forward more, and exact on any number of ranks and packs.
    """
    with policy.evaluating():
        found = [forward_pairs(policy, reference, b, loss, step.mean_chosen_tokens, world.device)[0]
                 for b in step.batches]
    whole = gather_pairs(found, step.positions, step.mean_chosen_tokens, world)
    chosen, rejected = whole.policy_chosen.requires_grad_(), whole.policy_rejected.requires_grad_()
    per_pair = preference_loss(replace(whole, policy_chosen=chosen, policy_rejected=rejected), loss)
    chosen_slope, rejected_slope = torch.autograd.grad(per_pair.mean(), (chosen, rejected))
    return per_pair.detach(), chosen_slope, rejected_slope


def gather_pairs(found: Sequence[PairLogps], positions: Sequence[Sequence[int]], mean_chosen_tokens: float,
                 world: World) -> PairLogps:
    """All ranks' pairs as one PairLogps on the CPU, ordered by position, without fillers. All ranks call it."""
    mine = [(list(at), {k: None if (v := getattr(p, k)) is None else v.detach().cpu().numpy() for k in PER_PAIR})
            for at, p in zip(positions, found, strict=True) if at]
    parts = [part for rank in world.gather(mine) for part in rank]
    order = np.argsort(np.concatenate([at for at, _ in parts]))

    def whole(name: str) -> Any:
        if parts[0][1][name] is None:
            return None
        return torch.from_numpy(np.concatenate([values[name] for _, values in parts])[order])

    return PairLogps(mean_chosen_tokens=mean_chosen_tokens, **{name: whole(name) for name in PER_PAIR})
