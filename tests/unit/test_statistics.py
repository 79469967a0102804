"""Intervals, tests, AUC and calibration: closed forms, brute force, and how often intervals hold the truth."""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dpo_dist.stats.auc import auc, auc_interval
from dpo_dist.stats.calibration import (
    brier,
    calibrating_factor,
    chance_calibration_error,
    expected_calibration_error,
    log_loss,
    reliability,
    sigmoid,
)
from dpo_dist.stats.differences import benjamini_hochberg, difference_of_shares, fisher_exact, holm
from dpo_dist.stats.intervals import (
    cluster_bootstrap,
    cluster_numbers,
    mean_interval,
    normal_quantile,
    share_interval,
    t_quantile,
    wilson,
)
from dpo_dist.stats.logistic import logistic_fit

# ------------------------------------------------------------------------------------------------------------ intervals


def test_wilsons_ends_are_where_the_score_test_just_rejects():
    for hits, n in ((0, 7), (3, 10), (81, 263), (10, 10)):
        for end in wilson(hits / n, n):
            if 0 < end < 1:
                assert abs(hits / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959963984540054)
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)       # Newcombe 1998, table I
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_pairs_of_equal_weight_and_a_prompt_each_get_wilsons_interval():
    values = np.array([1, 1, 0, 1, 0, 1, 1, 0.0, 1, 1])
    found = share_interval(values, clusters=np.arange(10))
    assert (found.value, found.n) == (0.7, 10) and (found.low, found.high) == pytest.approx(wilson(0.7, 10))
    assert share_interval([]) is None


def test_a_pair_that_stands_there_ten_times_says_as_much_as_once():
    values = np.array([1, 1, 0, 1, 0, 1, 1, 0.0, 1, 1] * 8)
    alone = share_interval(values, clusters=np.arange(80))
    repeated = share_interval(np.repeat(values, 10), clusters=np.repeat(np.arange(80), 10))
    width = (repeated.high - repeated.low) / (alone.high - alone.low)
    assert 1 <= width < 1.03, "but for Student's t"
    assert share_interval(np.repeat(values, 10)).high < alone.high - 0.05, "what comes of taking them for independent"


def test_all_hits_leave_doubt_and_prompts_count_once_where_they_cannot_be_compared():
    assert share_interval(np.ones(40), clusters=np.repeat(np.arange(8), 5)).low == pytest.approx(wilson(1.0, 8)[0])
    assert share_interval(np.ones(5), clusters=np.zeros(5, int)).low == pytest.approx(wilson(1.0, 1)[0])
    ties = share_interval(np.full(30, 0.5))
    assert ties.value == 0.5 and ties.low < 0.34, "ties were coin flips, not certainty"


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_intervals_of_shares_hold_the_truth_where_prompts_agree_with_themselves(share: float):
    rng, prompts, each = np.random.default_rng(1), 60, 4
    clusters = np.repeat(np.arange(prompts), each)
    held = naive = 0
    for _ in range(400):
        p = rng.beta(share * 1.5, (1 - share) * 1.5, prompts)                       # ICC 0.4
        values = (rng.random(prompts * each) < p[clusters]).astype(float)
        found, alone = share_interval(values, clusters=clusters), share_interval(values)
        held += found.low <= share <= found.high
        naive += alone.low <= share <= alone.high
    assert 0.92 <= held / 400 <= 0.985 and naive / 400 < 0.88


def test_a_mean_without_clusters_has_students_interval_and_clusters_sum_first():
    values = np.array([3.1, 2.0, 4.4, 5.0, 1.2])
    found = mean_interval(values)
    half = t_quantile(0.95, 4) * values.std(ddof=1) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    twice = mean_interval(np.repeat(values, 2), clusters=np.repeat(np.arange(5), 2))
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high))
    assert mean_interval([1.0, 2.0], clusters=np.zeros(2, int)).high == math.inf
    weighted = mean_interval(values, [1, 1, 1, 2, 2])
    assert weighted.value == pytest.approx(np.average(values, weights=[1, 1, 1, 2, 2]))


def test_students_quantiles_are_the_tables():
    tables = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 1000: 1.9623}
    for degrees, value in tables.items():
        assert t_quantile(0.95, degrees) == pytest.approx(value, rel=5e-3)
    assert normal_quantile(0.95) == pytest.approx(1.959964)


def test_the_bootstrap_by_cluster_agrees_with_the_formula_and_follows_from_its_seed():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(150), 3)
    values = rng.normal(size=150)[clusters] + rng.normal(size=450)

    def mean(w: np.ndarray) -> float:
        return float(np.average(values, weights=w))

    low, high = cluster_bootstrap(mean, np.ones(450), clusters)
    formula = mean_interval(values, clusters=clusters)
    assert (low, high) == pytest.approx((formula.low, formula.high), abs=0.03)
    assert cluster_bootstrap(mean, np.ones(450), clusters) == (low, high)
    assert cluster_bootstrap(mean, np.ones(450), clusters, seed=1) != (low, high)


def test_clusters_are_numbered_by_what_is_equal():
    assert cluster_numbers(np.array([9, 4, 9, 7], dtype=np.uint64)).tolist() == [2, 0, 2, 1]


# ---------------------------------------------------------------------------------------------------------- differences


def test_fishers_test_sums_what_is_no_likelier():
    for hits, n, all_hits, all_n in ((1, 9, 12, 24), (8, 10, 9, 30), (0, 5, 3, 12), (5, 5, 5, 9)):
        p = {k: math.comb(all_hits, k) * math.comb(all_n - all_hits, n - k) / math.comb(all_n, n)
             for k in range(max(0, n + all_hits - all_n), min(n, all_hits) + 1)}
        assert fisher_exact(hits, n, all_hits, all_n) == pytest.approx(sum(
            one for one in p.values() if one <= p[hits] * (1 + 1e-9)))
    assert fisher_exact(1, 12, 10, 24) == pytest.approx(0.002759, abs=1e-6)         # the textbook's dieters


def test_p_values_of_a_slice_that_is_no_different_are_small_no_oftener_than_they_say():
    rng, small = np.random.default_rng(2), 0
    clusters = np.repeat(np.arange(80), 5)
    inside = clusters < 12                                                         # whole prompts lie in a slice
    for _ in range(300):
        values = (rng.random(400) < rng.beta(2, 0.5, 80)[clusters]).astype(float)
        small += difference_of_shares(values, inside, clusters=clusters)[1] < 0.05
    assert small / 300 <= 0.065


def test_a_slice_that_is_different_is_found_and_ties_everywhere_are_no_difference():
    values = np.concatenate([np.ones(40), np.zeros(60), np.ones(350), np.zeros(150)])
    inside = np.arange(600) < 100
    difference, p = difference_of_shares(values, inside)
    assert difference == pytest.approx(-0.3) and p == pytest.approx(fisher_exact(40, 100, 390, 600))
    assert p < 1e-6 and difference_of_shares(np.repeat(values, 3), np.repeat(inside, 3),
                                             clusters=np.repeat(np.arange(600), 3))[1] == pytest.approx(p)
    assert difference_of_shares(np.full(20, 0.5), np.arange(20) < 10) == (0.0, 1.0)
    assert difference_of_shares([1.0, 0.0], np.array([True, False])) == (1.0, 1.0)
    few = np.ones(300)
    few[:3] = 0
    few[100:113] = 0                                                               # 3 of 10 wrong, elsewhere 13 of 290
    assert 0.005 < difference_of_shares(few, np.arange(300) < 10)[1] < 0.05


def test_corrections_are_their_definitions():
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert benjamini_hochberg(p) == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.5])
    assert holm([0.4, 0.9]).tolist() == [0.8, 0.9] and holm([]).tolist() == []
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = rng.random(9) ** 3
        ordered = np.sort(p)
        assert (benjamini_hochberg(p) <= 0.1).sum() == max(
            [k for k in range(1, 10) if ordered[k - 1] <= 0.1 * k / 9], default=0)
        rejected = next((k for k in range(9) if ordered[k] > 0.1 / (9 - k)), 9)
        assert (holm(p) <= 0.1).sum() == rejected


# ------------------------------------------------------------------------------------------------------------------ AUC


def test_auc_counts_couples_and_delong_is_its_definition():
    rng = np.random.default_rng(4)
    high, low = rng.integers(0, 9, 30).astype(float), rng.integers(-3, 7, 20).astype(float)
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in low] for a in high])
    assert auc(high, low) == pytest.approx(wins.mean())
    area = wins.mean()
    variance = wins.mean(1).var(ddof=1) / 30 + wins.mean(0).var(ddof=1) / 20
    found = auc_interval(high, low)
    half = 1.959964 * math.sqrt(variance) / (area * (1 - area))
    assert math.log(found.high / (1 - found.high)) - math.log(area / (1 - area)) == pytest.approx(half, rel=1e-5)
    each = auc_interval(high, low, np.arange(30), np.arange(30, 50))
    assert (each.low, each.high) == pytest.approx((found.low, found.high)), "clusters of one change nothing"
    assert auc_interval([1.0, 2.0], [0.0]).value == 1 and auc_interval([], [1.0]) is None


def test_auc_of_clusters_holds_the_truth_where_delong_claims_too_much():
    rng, held, naive = np.random.default_rng(5), 0, 0
    prompts = np.arange(60)
    clusters = np.repeat(prompts, 3)
    truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(2 * (0.25 + 0.36)) / math.sqrt(2)))
    for _ in range(200):
        quality = rng.normal(size=60)                                              # a prompt's gap, shared by its pairs
        high = 0.5 * rng.normal(size=180) + 0.6 * quality[clusters] + 0.5
        low = 0.5 * rng.normal(size=180) - 0.6 * quality[clusters]
        found, alone = auc_interval(high, low, clusters, clusters), auc_interval(high, low)
        held += found.low <= truth <= found.high
        naive += alone.low <= truth <= alone.high
    assert held / 200 >= 0.91 and naive < held


# ---------------------------------------------------------------------------------------------------------- calibration


def test_scores_of_probabilities_are_their_definitions():
    m = np.array([0.3, -1.2, 700.0, -800.0, 0.0])
    p = 1 / (1 + np.exp(-m[:2]))
    assert sigmoid(m)[:2] == pytest.approx(p) and sigmoid(m).tolist()[2:] == [1.0, 0.0, 0.5]
    assert log_loss(m[:2]) == pytest.approx(-np.log(p).mean()) and log_loss([0.0]) == pytest.approx(math.log(2))
    assert log_loss([-800.0]) == 800
    assert brier([0.9, 0.4], [1, 0], np.array([1, 3])) == pytest.approx((0.01 + 3 * 0.16) / 4)


def test_bins_have_equal_mass_and_the_error_is_their_mean_distance():
    p = np.linspace(0.5, 1, 100)
    y = (np.arange(100) % 4 > 0).astype(float)
    bins = reliability(p, y, bins=5)
    assert [one.n for one in bins] == [20] * 5 and bins[0].low == 0.5 and bins[-1].high == 1
    assert [one.observed for one in bins] == [0.75] * 5
    assert expected_calibration_error(bins) == pytest.approx(np.mean([abs(p[i:i + 20].mean() - 0.75)
                                                                     for i in range(0, 100, 20)]))
    heavy = reliability(p, y, np.where(p > 0.9, 9.0, 1.0), bins=4)
    assert max(one.weight for one in heavy) / sum(one.weight for one in heavy) < 0.3
    same = reliability(np.full(50, 0.5), y[:50])
    assert len(same) == 1 and same[0].n == 50, "equal probabilities are not parted"
    assert reliability([], []) == []


def test_calibrated_predictions_err_no_more_than_chance_and_overconfident_ones_do():
    rng, above = np.random.default_rng(6), 0
    for seed in range(40):
        p = 0.5 + 0.5 * rng.random(600)
        bins = reliability(p, (rng.random(600) < p).astype(float))
        above += expected_calibration_error(bins) > chance_calibration_error(bins, seed)
    assert above <= 6
    bins = reliability(sigmoid(3 * np.log(p / (1 - p))), (rng.random(600) < p).astype(float))
    assert expected_calibration_error(bins) > 2 * chance_calibration_error(bins)


def test_the_calibrating_factor_is_the_likeliest_and_its_interval_holds_the_truth():
    rng, held = np.random.default_rng(7), 0
    for truth in (0.25, 1.0, 3.0) * 50:
        strength = rng.normal(size=500)
        m = np.where(rng.random(500) < sigmoid(truth * strength), strength, -strength)
        found = calibrating_factor(m)
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 150 <= 0.99
    grid = np.linspace(found.value - 0.3, found.value + 0.3, 601)
    assert abs(grid[np.argmin([log_loss(s * m) for s in grid])] - found.value) < 1.5e-3
    assert calibrating_factor(1000 * m).value == pytest.approx(found.value / 1000), "whatever the unit"
    assert calibrating_factor([4.0, -1.0], [1, 4]).value == pytest.approx(0, abs=1e-9)
    assert calibrating_factor([1.0, -4.0]).value < 0


def test_there_is_no_calibrating_factor_where_the_likelihood_has_no_maximum():
    assert calibrating_factor([0.2, 0.1, 3.0]) is None and calibrating_factor([-1.0, -2.0]) is None
    assert calibrating_factor([0.0, 0.0]) is None and calibrating_factor([]) is None
    assert calibrating_factor([1e-9, -2e-10, 500.0]) is not None


# ------------------------------------------------------------------------------------------------------------- logistic


def test_logistic_fits_are_closed_forms_and_none_where_the_data_are_separable():
    x = np.repeat([[1.0, 0.0], [1.0, 1.0]], [40, 60], axis=0)
    y = np.concatenate([np.arange(40) < 30, np.arange(60) < 15]).astype(float)
    fit = logistic_fit(x, y)
    assert fit.coefficients == pytest.approx([math.log(3), math.log(1 / 3) - math.log(3)])
    assert fit.covariance[0, 0] == pytest.approx(1 / 30 + 1 / 10, rel=0.03)         # the odds' own variance
    assert logistic_fit(x, x[:, 1]) is None
    assert logistic_fit(np.repeat(x, 2, axis=1)[:, :2], y) is None, "two columns that say the same"


def test_brute_force_agrees_with_a_small_logistic_fit():
    x = np.array([[1, 0.2], [1, -1.0], [1, 0.7], [1, 2.0], [1, -0.3]])
    y = np.array([1, 0, 0, 1, 1.0])
    fit = logistic_fit(x, y)
    best = min(itertools.product(np.linspace(-1, 2, 151), np.linspace(-1, 3, 201)),
               key=lambda b: np.logaddexp(0, -(2 * y - 1) * (x @ np.array(b))).sum())
    assert fit.coefficients == pytest.approx(best, abs=0.03)
