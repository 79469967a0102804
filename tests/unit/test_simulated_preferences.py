"""Preferences simulated from a known truth (Bradley-Terry with ties and flipped labels): the losses find it again, on a
policy small enough to know its optimum."""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from torch import Tensor

from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.stats.calibration import (
    calibrating_factor,
    chance_calibration_error,
    expected_calibration_error,
    reliability,
    sigmoid,
)

sys.path.insert(0, str(REPO / "benchmarks"))

import frontier
from toy_policy import (
    Toy,
    bradley_terry,
    davidson,
    fitted,
    flipped,
    implied_reward,
    mean_loss,
    rao_kupper,
    reward_errors,
    sampled,
    total_variation,
)

TOY = Toy.drawn(prompts=4, answers=5, seed=0)
BETAS = (0.05, 0.3, 2.0)
WITH_TIES: list[tuple[str, Callable[[Tensor, float], Tensor], float]] = [
    ("rao_kupper", rao_kupper, 3.0), ("rao_kupper", rao_kupper, 1.3), ("davidson", davidson, 1.0),
    ("davidson", davidson, 0.2)]


def distance(policy: Tensor, beta: float, toy: Toy = TOY) -> float:
    """The largest total variation from the closed form."""
    return float(total_variation(policy, toy.optimum(beta)).max())


def differences(toy: Toy, policy: Tensor, beta: float) -> Tensor:
    """(P, M) what the policy says of the reward of i less that of j."""
    i, j = toy.pairs
    reward = implied_reward(toy, policy, beta)
    return reward[:, i] - reward[:, j]


# --------------------------------------------------------------------------------- the optimum of the population's loss


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.3, 1.0, 5.0])
def test_dpo_reaches_the_closed_form_for_every_beta(beta: float):
    assert distance(fitted(TOY, bradley_terry(TOY.difference), LossConfig("sigmoid", beta=beta)), beta) < 1e-5
    assert distance(TOY.reference, beta) > 0.05, "which is somewhere else than the reference"


@pytest.mark.parametrize("beta", BETAS)
def test_robust_dpo_reaches_it_from_flipped_labels_whose_rate_it_knows(beta: float):
    noisy = flipped(bradley_terry(TOY.difference), 0.2)
    assert distance(fitted(TOY, noisy, LossConfig("robust", beta=beta, label_smoothing=0.2)), beta) < 1e-5
    assert distance(fitted(TOY, noisy, LossConfig("robust", beta=beta, label_smoothing=0.1)), beta) > 0.01


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_dpo_and_cdpo_keep_the_order_of_flipped_labels_and_shrink_differences_by_a_known_amount(epsilon: float):
    """One pair of answers a prompt: so every margin is free to be the log odds that the loss asks for."""
    toy = Toy.drawn(prompts=40, answers=2, seed=3)
    noisy = flipped(bradley_terry(toy.difference), 0.2)
    found = differences(toy, fitted(toy, noisy, LossConfig("sigmoid", beta=0.3, label_smoothing=epsilon)), 0.3)
    said = noisy[..., 0]                                                     # how often i is called the better one
    target = (1 - epsilon) * said + epsilon * (1 - said)
    torch.testing.assert_close(found, target.logit(), atol=1e-5, rtol=0)
    assert torch.equal(found.sign(), toy.difference.sign()) and (found.abs() < toy.difference.abs()).all()


@pytest.mark.parametrize(("name", "truth", "nu"), WITH_TIES)
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_losses_that_know_ties_reach_the_closed_form_from_judgments_with_ties(
        name: str, truth: Callable[[Tensor, float], Tensor], nu: float, beta: float):
    judgments = truth(TOY.difference, nu)
    assert float(judgments[..., 2].mean()) > 0.1
    assert distance(fitted(TOY, judgments, LossConfig(name, beta=beta, tie_nu=nu)), beta) < 1e-5


def test_without_the_ties_dpo_is_right_under_davidsons_model_and_too_sure_under_rao_and_kuppers():
    """Davidson's ties take the same share from either winner (Luce's axiom); Rao and Kupper's take more from the
    unlikely one."""
    for truth, nu, close in ((davidson, 1.0, True), (rao_kupper, 3.0, False)):
        decided = truth(TOY.difference, nu)
        decided[..., 2] = 0
        policy = fitted(TOY, decided, LossConfig("sigmoid", beta=0.3))
        assert (distance(policy, 0.3) < 1e-5) == close
        assert close or (differences(TOY, policy, 0.3).abs() > TOY.difference.abs()).all()


@pytest.mark.parametrize(("alpha", "strength"), [(1.0, 3.0), (0.5, 0.2), (2.0, 1.0)])
def test_odpo_asks_the_wins_and_the_losses_of_a_pair_for_its_offset(alpha: float, strength: float):
    """One pair a prompt, offset δ = α log strength: where the slope p σ(δ - d) - (1 - p) σ(δ + d) is 0, x = e^d solves
    (1 - p) x² - (2p - 1) a x - p = 0 with a = e^δ; at δ = 0 that is DPO's d = log p / (1 - p)."""
    toy = Toy.drawn(prompts=30, answers=2, seed=4)
    judgments = bradley_terry(toy.difference)
    policy = fitted(toy, judgments, LossConfig("odpo", beta=0.5, odpo_alpha=alpha),
                    strength=torch.full_like(judgments, strength))
    p, a = judgments[..., 0], strength**alpha
    x = (a * (2 * p - 1) + (a**2 * (2 * p - 1) ** 2 + 4 * p * (1 - p)).sqrt()) / (2 * (1 - p))
    torch.testing.assert_close(differences(toy, policy, 0.5), x.log(), atol=1e-5, rtol=0)


def test_odpo_with_labels_that_are_all_one_way_reaches_further_the_stronger_they_are():
    """The margin that brings the loss of a pair to the same value grows by α log strength."""
    toy = Toy(torch.zeros(1, 2, dtype=torch.float64).log_softmax(-1), torch.zeros(1, 2, dtype=torch.float64))
    always = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    loss = resolve_loss(LossConfig("odpo", beta=1.0, odpo_alpha=0.7))
    at = torch.tensor([[1.0, -1.0]], dtype=torch.float64) / 2
    moved = at + torch.tensor([[1.0, -1.0]], dtype=torch.float64) * 0.7 * math.log(5) / 2
    first = mean_loss(toy, toy.reference + at, always, loss, torch.ones_like(always))
    second = mean_loss(toy, toy.reference + moved, always, loss, torch.full_like(always, 5.0))
    torch.testing.assert_close(first, second)


# ------------------------------------------------------------------------------------------------------- finite samples


def repeated(times: int, answers: int = 4, seed: int = 5) -> Toy:
    """The same prompt that often: each is an experiment of its own."""
    toy = Toy.drawn(1, answers, seed)
    return Toy(toy.reference.repeat(times, 1), toy.reward.repeat(times, 1))


@pytest.mark.parametrize(("name", "truth", "options"), [
    ("sigmoid", lambda d: bradley_terry(d), {}), ("rao_kupper", lambda d: rao_kupper(d, 2.0), {"tie_nu": 2.0}),
    ("davidson", lambda d: davidson(d, 0.7), {"tie_nu": 0.7})], ids=["dpo", "rao_kupper", "davidson"])
def test_intervals_of_the_rewards_from_finite_samples_hold_the_truth_about_as_often_as_they_say(
        name: str, truth: Callable[[Tensor], Tensor], options: dict[str, float]):
    toy, loss = repeated(300), LossConfig(name, beta=0.3, **options)                             # type: ignore[arg-type]
    judgments = sampled(truth(toy.difference), each=80, seed=6)
    policy = fitted(toy, judgments, loss)
    errors = reward_errors(toy, policy, judgments, loss)
    miss = (implied_reward(toy, policy, 0.3) - (toy.reward - toy.reward[:, :1]))[:, 1:] / errors
    covered = float((miss.abs() < 1.96).double().mean())
    assert 0.925 < covered < 0.975, "95 % intervals; 300 experiments of three rewards each"
    assert abs(float(miss.mean())) < 0.15 and 0.9 < float(miss.std()) < 1.1
    assert float((errors * miss).abs().max()) < 1.2, "in the rewards' own unit"


def test_ties_that_are_kept_make_the_intervals_narrower_than_ties_that_are_dropped():
    toy = repeated(100)
    judgments = sampled(davidson(toy.difference, 1.0), each=80, seed=7)
    decided = judgments.clone()
    decided[..., 2] = 0
    errors = []
    for name, said, options in (("davidson", judgments, {"tie_nu": 1.0}), ("sigmoid", decided, {})):
        loss = LossConfig(name, beta=0.3, **options)                                             # type: ignore[arg-type]
        errors.append(float(reward_errors(toy, fitted(toy, said, loss), said, loss).mean()))
    assert errors[0] < 0.9 * errors[1]


# ---------------------------------------------------------------------------------------------------------- calibration


def held_out(toy: Toy, policy: Tensor, beta: float, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) logits of what happened and numbers of the prompts, of held-out judgments by Bradley-Terry's truth."""
    margin, truth = differences(toy, policy, beta).reshape(-1).numpy(), toy.difference.reshape(-1).numpy()
    r = np.random.default_rng(seed)
    at = r.integers(len(margin), size=pairs)
    first_wins = r.random(pairs) < sigmoid(truth[at])
    return np.where(first_wins, margin[at], -margin[at]), at // len(toy.pairs[0])


def curve(logit: np.ndarray) -> list[Any]:
    """Of the answer that the policy prefers: predicted and observed, as evaluations have it."""
    return reliability(sigmoid(np.abs(logit)), logit > 0)


WIDE = Toy.drawn(prompts=60, answers=5, seed=8, spread=1.5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_policy_trained_on_the_truth_is_calibrated_on_held_out_judgments(beta: float):
    """Each of three figures is off by chance in 5 of 100 held-out sets: here at most three standard errors more."""
    policy = fitted(WIDE, bradley_terry(WIDE.difference), LossConfig("sigmoid", beta=beta))
    sets = 60
    small, within, factors = 0, 0.0, 0
    for seed in range(sets):
        logit, prompts = held_out(WIDE, policy, beta, 3000, seed)
        bins, factor = curve(logit), calibrating_factor(logit, clusters=prompts)
        small += expected_calibration_error(bins) < chance_calibration_error(bins)
        within += np.mean([one.observed_low <= one.predicted <= one.observed_high for one in bins])
        assert factor is not None and factor.high - factor.low < 0.25
        factors += factor.low < 1 < factor.high
    assert min(small, factors) / sets > 0.95 - 3 * math.sqrt(0.05 * 0.95 / sets)
    assert 0.92 < within / sets < 0.98


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_the_beta_that_would_calibrate_is_recovered_within_its_interval(factor: float):
    """A policy that is as sure as if the rewards were 1 / factor of what they are."""
    policy = fitted(WIDE, bradley_terry(WIDE.difference / factor), LossConfig("sigmoid", beta=0.3))
    inside, experiments = 0, 60
    for seed in range(experiments):
        logit, _ = held_out(WIDE, policy, 0.3, 1500, seed)
        found = calibrating_factor(logit)
        assert found is not None and found.value == pytest.approx(factor, rel=0.3)
        inside += found.low < factor < found.high
    assert inside / experiments > 0.87                                       # 95 % of 60, less three standard errors
    assert expected_calibration_error(curve(logit)) > chance_calibration_error(curve(logit))


def test_flipped_labels_make_a_policy_too_unsure_and_robust_dpo_does_not_mind():
    noisy = flipped(bradley_terry(WIDE.difference), 0.2)
    for name, options, calibrated in (("sigmoid", {}, False), ("robust", {"label_smoothing": 0.2}, True)):
        policy = fitted(WIDE, noisy, LossConfig(name, beta=0.3, **options))                      # type: ignore[arg-type]
        logit, _ = held_out(WIDE, policy, 0.3, 6000, seed=10)
        found = calibrating_factor(logit)
        assert found is not None
        assert (found.low < 1 < found.high) if calibrated else found.low > 1.2


def test_decided_pairs_under_davidsons_model_are_as_likely_as_the_margin_says():
    """So the implied probability of a kept-ties run is compared with its decided pairs alone."""
    decided = davidson(TOY.difference, 0.8)[..., :2]
    torch.testing.assert_close(decided[..., 0] / decided.sum(-1), TOY.difference.sigmoid())


# ------------------------------------------------------------------------------------------------------------- frontier


def test_over_beta_dpo_lies_on_the_frontier_of_the_closed_form_and_no_sample_lies_above():
    toy = Toy.drawn(prompts=3, answers=4, seed=11)
    found = frontier.frontier(toy, [0.1, 1.0])
    for point in found["points"]:
        assert point["below"] > -1e-6, "nothing has more reward at its KL"
        if point["data"] == "population":
            optimum = toy.optimum(point["beta"])
            assert point["kl"] == pytest.approx(toy.kl(optimum), abs=1e-5)
            assert point["reward"] == pytest.approx(toy.value(optimum), abs=1e-5) and point["below"] < 1e-5
    values = [(point["kl"], point["reward"]) for point in found["closed_form"]]
    assert values == sorted(values, reverse=True), "less beta, more KL and more reward"


def test_the_committed_frontier_says_so_for_eight_betas():
    found = json.loads(frontier.RESULTS.read_text())
    population = [point for point in found["points"] if point["data"] == "population"]
    assert [point["beta"] for point in population] == list(frontier.BETAS)
    assert all(point["total_variation"] < 0.01 and abs(point["below"]) < 1e-4 for point in population)
