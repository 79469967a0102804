"""How far the policy is from the reference, as metrics tell it, is what the written-out definition says, token by
token."""
from __future__ import annotations

import math

import pytest
import torch

from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.logps import drift, pair_logps
from dpo_dist.losses import preference_loss
from dpo_dist.run.metrics import MetricSums
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch, TokenizedPair, TokenLogps

PAIRS = [TokenizedPair((5, 6), (7, 8, 1), (9, 1), "a"), TokenizedPair((5, 6, 7), (4, 1), (9, 9, 9, 1), "b")]
WEIGHTS = [1.0, 3.0]


def example() -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    """A pack and the log-probs of its completion tokens by a policy and by a reference."""
    batch = pack_pairs(PAIRS, [0, 1], WEIGHTS)
    torch.manual_seed(0)
    return batch, -torch.rand(len(batch.targets)) * 3, -torch.rand(len(batch.targets)) * 3


def test_kl_estimate_and_drift_are_means_over_a_pairs_tokens():
    batch, policy, reference = example()
    kl, chosen_drift = drift(batch, policy, reference)
    for b in range(2):
        tokens = {which: (batch.sequence == int(getattr(batch, which)[b])).nonzero()[:, 0].tolist()
                  for which in ("chosen", "rejected")}
        r = {t: (reference[t] - policy[t]).item() for t in tokens["chosen"] + tokens["rejected"]}
        assert kl[b].item() == pytest.approx(sum(math.exp(x) - 1 - x for x in r.values()) / len(r), rel=1e-6)
        assert chosen_drift[b].item() == pytest.approx(-sum(r[t] for t in tokens["chosen"]) / len(tokens["chosen"]),
                                                       rel=1e-6)
    assert (kl > 0).all()
    assert drift(batch, policy, policy)[0].abs().max() == 0


@pytest.mark.parametrize(("loss", "measured"), [(LossConfig("sigmoid"), True), (LossConfig("ipo", ld_alpha=0.5), True),
                                                (LossConfig("simpo"), False)])
def test_metrics_weigh_pairs_as_the_loss_does_and_know_a_reference_only_where_there_is_one(
        loss: LossConfig, measured: bool, world: World):
    batch, policy, reference = example()
    loss = resolve_loss(loss)
    pairs = pair_logps(batch, TokenLogps(policy), reference if loss.needs_reference else None, loss, 2.5)
    sums = MetricSums(loss, world.device)
    sums.add(pairs, preference_loss(pairs, loss), batch.weight.double())
    means = sums.means(world)
    if not measured:
        assert not [name for name in means if name.startswith("reference/")]
        return
    kl, chosen_drift = drift(batch, policy, reference)              # ld_alpha changes neither
    assert means["reference/kl_per_token"] == pytest.approx(((kl[0] + 3 * kl[1]) / 4).item(), rel=1e-9)
    assert (means["reference/chosen_drift_per_token"]
            == pytest.approx(((chosen_drift[0] + 3 * chosen_drift[1]) / 4).item(), rel=1e-9))


def test_sums_that_were_kept_go_on_as_if_nothing_had_been_between(world: World):
    config = resolve_loss(LossConfig("sigmoid"))
    batch, policy, reference = example()
    pairs, weight = pair_logps(batch, TokenLogps(policy), reference, config, 2.5), batch.weight.double()
    whole, first = MetricSums(config, world.device), MetricSums(config, world.device)
    for sums in (whole, first):
        sums.add(pairs, preference_loss(pairs, config), weight)
    later = MetricSums(config, world.device, first.total(world))
    for sums in (whole, later):
        sums.add(pairs, 2 * preference_loss(pairs, config), weight)
    assert later.means(world) == whole.means(world)
