"""EvaluatedPairs → the summary of an evaluation: an entry of evaluation.json. Intervals are at 95 %, by prompt."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.config.schema import LossConfig
from dpo_dist.evaluation.facts import Facts
from dpo_dist.evaluation.pairs import EvaluatedPairs, Floats, hits
from dpo_dist.evaluation.rewardbench import rewardbench_of
from dpo_dist.evaluation.slices import slices_of
from dpo_dist.stats.calibration import (
    brier,
    calibrating_factor,
    chance_calibration_error,
    expected_calibration_error,
    log_loss,
    reliability,
    sigmoid,
)
from dpo_dist.stats.intervals import normal_quantile, share_interval
from dpo_dist.stats.logistic import logistic_fit

Summary = dict[str, Any]


def summarize(step: int, pairs: EvaluatedPairs, facts: Facts, loss: LossConfig, start: EvaluatedPairs | None = None,
              kl: Summary | None = None) -> Summary:
    """The summary. start: the same pairs before training, for losses whose reference says nothing of that; kl: as
    sampled_kl.py found it. What a loss has none of is null: sft has no rewards, simpo no reference.

    accuracy     share of pairs whose chosen has the higher reward; pairs that the data call ties are left out
    baselines    the same for a judge that takes the longer answer, and for the reference's own log-probs, whole and a
                 token
    length_controlled  accuracy where chosen is shorter: nothing is won by length there
    at_equal_length    accuracy at equal length by a logistic fit on the difference in length, as AlpacaEval's
                 length-controlled win rate (arXiv 2404.04475) has it: σ of the intercept
    """
    judged = ~facts.tie
    rated = pairs.has_rewards
    margin = pairs.margin
    hit = hits(margin)
    shorter = judged & (pairs.chosen_tokens < pairs.rejected_tokens)
    slices, left_out = slices_of(hit, pairs.weight, facts, judged) if rated else ([], 0)

    def share(values: Floats, where: NDArray[np.bool_] = judged) -> Summary | None:
        found = share_interval(values[where], pairs.weight[where], facts.prompt[where])
        return None if found is None else found.as_dict()

    longer = hits((pairs.chosen_tokens - pairs.rejected_tokens).astype(np.float64))
    referred = pairs.reference_chosen - pairs.reference_rejected
    referred_a_token = pairs.reference_chosen / pairs.chosen_tokens - pairs.reference_rejected / pairs.rejected_tokens
    compares = pairs.has_reference and not np.isnan(referred).all()
    return without_nan({
        "step": step, "pairs": len(pairs), "prompts": len(np.unique(facts.prompt)), "ties": int(facts.tie.sum()),
        "accuracy": share(hit) if rated else None,
        "baselines": {"length": share(longer), "reference": share(hits(referred)) if compares else None,
                      "reference_per_token": share(hits(referred_a_token)) if compares else None},
        "length_controlled": share(hit, shorter) if rated else None,
        "at_equal_length": at_equal_length(hit, pairs, facts, judged) if rated else None,
        "calibration": calibration(pairs, facts, loss, judged) if rated else None,
        "displacement": displacement(pairs, facts, loss, start),
        "slices": slices, "slices_left_out": left_out,
        "rewardbench": rewardbench_of(margin, facts) if rated else None, "kl": kl})


def at_equal_length(hit: Floats, pairs: EvaluatedPairs, facts: Facts, judged: NDArray[np.bool_]) -> Summary | None:
    """P(chosen is ahead) = σ(a + b · tanh(Δ / sd Δ)), Δ = chosen's tokens less rejected's: σ(a), with the interval of
    a. None where the fit has no end (nearly all pairs right, or lengths that decide everything), and before training,
    where no answer is ahead."""
    delta = (pairs.chosen_tokens - pairs.rejected_tokens).astype(np.float64)[judged]
    spread = float(delta.std())
    if not spread or (hit[judged] == 0.5).all():
        return None
    fit = logistic_fit(np.stack([np.ones(len(delta)), np.tanh(delta / spread)], axis=1), hit[judged],
                       pairs.weight[judged], facts.prompt[judged])
    if fit is None:
        return None
    a, half = float(fit.coefficients[0]), normal_quantile(0.95) * math.sqrt(fit.covariance[0, 0])
    value, low, high = sigmoid([a, a - half, a + half]).tolist()
    return {"value": value, "low": low, "high": high, "n": len(delta)}


def calibration(pairs: EvaluatedPairs, facts: Facts, loss: LossConfig, judged: NDArray[np.bool_]) -> Summary | None:
    """Whether σ(logit) is the share of pairs in which it is right; None where a number is not finite.

    Which answer stands first is arbitrary, so a bin holds pairs by the probability of the answer that the policy
    prefers, from 0.5 on, and `observed` is how often the data prefer it too. Brier and log loss are the same either
    way. ece_by_chance: what a calibrated policy stays below in 95 of 100 such sets. calibrating_beta: the beta from 0
    on under which these pairs are likeliest, with the policy as it is; null where none is (all pairs are right).
    """
    logit, weight, prompt = pairs.logit[judged], pairs.weight[judged], facts.prompt[judged]
    if not len(logit) or not np.isfinite(logit).all():
        return None
    bins = reliability(sigmoid(np.abs(logit)), hits(logit), weight, prompt)
    factor = calibrating_factor(logit, weight, prompt)
    beta = loss.beta
    # rao_kupper's log odds are not beta times something
    betas = None if factor is None or beta is None or "rao_kupper" in loss.weights else [
        max(0.0, beta * value) for value in (factor.value, factor.low, factor.high)]
    return {
        "ece": expected_calibration_error(bins), "ece_by_chance": chance_calibration_error(bins),
        "brier": brier(sigmoid(logit), np.ones(len(logit)), weight), "log_loss": log_loss(logit, weight),
        "calibrating_beta": None if betas is None else betas[0],
        "calibrating_beta_low": None if betas is None else betas[1],
        "calibrating_beta_high": None if betas is None else betas[2],
        "calibrating_factor": None if factor is None else factor.as_dict(), "beta": beta,
        "bins": [{"low": one.low, "high": one.high, "n": one.n, "predicted": one.predicted, "observed": one.observed,
                  "observed_low": one.observed_low, "observed_high": one.observed_high} for one in bins]}


def displacement(pairs: EvaluatedPairs, facts: Facts, loss: LossConfig, start: EvaluatedPairs | None) -> Summary | None:
    """How log-probs moved, in nats a token: means over pairs, and the shares of pairs whose chosen, and whose both
    answers, became less likely (arXiv 2410.08847). Since the start of training where that evaluation is at hand, else
    from the reference; None where there is neither, or rejected answers are not computed."""
    if start is not None and len(start) == len(pairs):
        since, chosen, rejected = "step 0", start.policy_chosen, start.policy_rejected
    elif pairs.has_reference:
        since, chosen, rejected = "reference", pairs.reference_chosen, pairs.reference_rejected
    else:
        return None
    moved = (pairs.policy_chosen - chosen) / pairs.chosen_tokens
    moved_rejected = (pairs.policy_rejected - rejected) / pairs.rejected_tokens
    if np.isnan(moved_rejected).all():
        return None
    falling, both = (share_interval(values.astype(np.float64), pairs.weight, facts.prompt)
                     for values in (moved < 0, (moved < 0) & (moved_rejected < 0)))
    assert falling is not None and both is not None
    return {"since": since, "chosen_per_token": float(np.average(moved, weights=pairs.weight)),
            "rejected_per_token": float(np.average(moved_rejected, weights=pairs.weight)),
            "share_chosen_falling": falling.as_dict(), "share_both_falling": both.as_dict()}


def without_nan(value: Any) -> Any:
    """The same with null for numbers that are not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
