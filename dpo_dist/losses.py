"""Pure pairwise losses and their table. Each takes a pack's PairLogps and returns the (B,) loss of its pairs.

Notation: c, r = chosen and rejected completion; logratio = log policy - log reference, in nats, summed over a
completion; σ = the logistic function; |c| = the completion's tokens. Which options each loss uses stands in
loss_options.py.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_dist.config.errors import UserError
from dpo_dist.config.loss_options import LOSS_OPTIONS
from dpo_dist.config.schema import LossConfig
from dpo_dist.types import PairLogps


def preference_loss(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) loss of each pair: the weighted sum of the configured terms. `loss` is resolved: every option in use has a
    value.

    WPO (arXiv 2406.11827) multiplies terms by pairs.wpo_weight, a constant: those whose row in LOSS_OPTIONS has `wpo`,
    which compare policy and reference on this pair. In a mixture sft, and every other term without that option, keeps
    its full weight: it is supervised learning, not an off-policy comparison. (TRL would weight sft too.)
    """
    total = torch.zeros_like(pairs.policy_chosen)
    for name, weight in loss.weights.items():
        value = LOSSES[name](pairs, loss)
        if loss.wpo and "wpo" in LOSS_OPTIONS[name].defaults:
            assert pairs.wpo_weight is not None, "loss.wpo needs PairLogps.wpo_weight"
            value = pairs.wpo_weight * value
        total = total + weight * value
    return total


def rewards(pairs: PairLogps, loss: LossConfig) -> tuple[Tensor, Tensor] | None:
    """Implicit rewards of chosen and rejected for metrics, each (B,), without gradient; None where the loss has none
    (sft).

    With a reference: beta · logratio, whatever the loss, its length normalization or its divergence, also under a
    mixture, as TRL reports it. Without: the log-probs that the loss compares, scaled as TRL does: simpo beta · log
    policy / tokens, cpo beta · log policy, orpo orpo_lambda · log policy / tokens; of a mixture's terms the first that
    has one.
    """
    with torch.no_grad():
        if loss.needs_reference:
            return _implicit_rewards(pairs, loss)
        for options in map(LOSS_OPTIONS.__getitem__, loss.weights):
            if options.reward_scale is not None:
                scale = _number(getattr(loss, options.reward_scale))
                chosen, rejected = _whole(pairs) if options.reward_of == "sum" else _token_means(pairs)
                return scale * chosen, scale * rejected
        return None


def preference_logit(pairs: PairLogps, loss: LossConfig) -> Tensor | None:
    """(B,) log odds that chosen is preferred to rejected, given that one of them is, as the loss has it, without
    gradient; None where the loss has no rewards (sft).

    The difference of `rewards`, but for losses that compare something else: beta · the difference of f' under another
    divergence, of log-ratios a token with sigmoid_norm, and with rao_kupper what is left of its three outcomes.
    """
    with torch.no_grad():
        if "sigmoid_norm" in loss.weights:
            chosen, rejected = _scores(pairs, loss)
            return _number(loss.beta) * (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens)
        if loss.needs_reference and loss.f_divergence is not None:
            logit = _margin(pairs, loss)
        elif (found := rewards(pairs, loss)) is not None:
            logit = found[0] - found[1]
        else:
            return None
        if "rao_kupper" in loss.weights:
            alpha = math.log(_number(loss.tie_nu))
            return logsigmoid(logit - alpha) - logsigmoid(-logit - alpha)
        return logit


def check_strengths(strength: Tensor) -> None:
    """UserError unless all (B,) strengths are above 0, as odpo's margin needs; for a data set or a pack."""
    unknown, not_above = int(strength.isnan().sum()), int((strength <= 0).sum())
    if unknown or not_above:
        raise UserError("loss odpo needs the strength of every pair (how much better chosen is rated than rejected), "
                        f"above 0: of {len(strength)} rows {unknown} have none and {not_above} have 0 or less; drop "
                        "them, or set loss=dpo")


# ------------------------------------------------------------------------------------------------------ building blocks


def _number(option: float | None) -> float:
    assert option is not None, "an option in use is None: pass the LossConfig through resolve_loss"
    return option


def _logratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """log policy - log reference of chosen and rejected, each (B,), nats."""
    assert pairs.reference_chosen is not None, "this loss needs the reference's log-probs"
    assert pairs.reference_rejected is not None
    return pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected


def _scores(pairs: PairLogps, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """f'(policy / reference) of chosen and rejected, each (B,), log-ratios under reverse KL. f-DPO (arXiv 2309.16240).

    The constant of f' is such that f'(1) = 0: a policy equal to its reference scores 0. It cancels in the difference of
    the two, except in ipo and sigmoid_norm, which divide each by its own length (the golden ipo_forward_kl holds it
    there).
    """
    chosen, rejected = _logratios(pairs)
    return _f_prime(chosen, loss), _f_prime(rejected, loss)


def _f_prime(logratio: Tensor, loss: LossConfig) -> Tensor:
    """(B,) f'(t) at log t = logratio."""
    match loss.f_divergence:
        case "reverse_kl":
            return logratio                                          # f'(t) = log t
        case "forward_kl":
            return -_expm1(-logratio)                                # f'(t) = 1 - 1/t
        case "js_divergence":
            return logsigmoid(logratio) + math.log(2)                # f'(t) = log(2t / (1 + t))
        case "alpha_divergence":
            power = _number(loss.f_alpha) - 1.0
            # f'(t) = (t^(α-1) - 1) / (α-1), log t at α = 1
            return _expm1(power * logratio) / power if power else logratio
        case other:
            raise AssertionError(f"f_divergence={other!r}: pass the LossConfig through resolve_loss")


def _expm1(x: Tensor) -> Tensor:
    """(B,) e^x - 1; where e^(4x) would overflow, its tangent: huge values keep their order and finite squares."""
    bound = math.log(torch.finfo(x.dtype).max) / 4                   # 22 nats in fp32, 177 in fp64
    return x.clamp(max=bound).expm1() + math.exp(bound) * (x - bound).clamp(min=0)


def _margin(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) beta · (score of chosen - score of rejected): the logit that chosen is preferred."""
    chosen, rejected = _scores(pairs, loss)
    return _number(loss.beta) * (chosen - rejected)


def _implicit_rewards(pairs: PairLogps, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """beta · logratio of chosen and rejected, each (B,), whatever f_divergence is: for metrics, and for losses that use
    each by itself."""
    chosen, rejected = _logratios(pairs)
    return _number(loss.beta) * chosen, _number(loss.beta) * rejected


def _cross_entropy(logit: Tensor, label_smoothing: float | None) -> Tensor:
    """(B,) nats: -(1-ε) log σ(logit) - ε log σ(-logit), for labels that are wrong with probability ε."""
    epsilon = _number(label_smoothing)
    return -(1 - epsilon) * logsigmoid(logit) - epsilon * logsigmoid(-logit)


def _whole(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """log policy of chosen and rejected, each (B,), nats: all tokens in full, even where ld_alpha shortens others."""
    if pairs.whole_chosen is None or pairs.whole_rejected is None:
        return pairs.policy_chosen, pairs.policy_rejected
    return pairs.whole_chosen, pairs.whole_rejected


def _token_means(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """log policy / tokens of chosen and rejected, each (B,), nats a token."""
    chosen, rejected = _whole(pairs)
    return chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens


# ----------------------------------------------------------------------------- losses of the chosen-rejected difference


def sigmoid(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. DPO (arXiv 2305.18290), eq. 7. With label_smoothing ε > 0: conservative DPO (cDPO)."""
    return _cross_entropy(_margin(pairs, loss), loss.label_smoothing)       # -log σ(β (logratio_c - logratio_r))


def hinge(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) no unit. SLiC's hinge (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657); margin 1/beta nats."""
    return (1 - _margin(pairs, loss)).relu()                                # max(0, 1 - β (logratio_c - logratio_r))


def ipo(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) (nats a token)². IPO (arXiv 2310.12036), eq. 17, with tau = beta.

    Log-ratios are means over the completion's tokens where the paper has sums (TRL's definition, which the golden
    numbers hold).
    """
    chosen, rejected = _scores(pairs, loss)
    difference = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
    return (difference - 1 / (2 * _number(loss.beta))).square()             # (h - 1 / 2τ)²


def sigmoid_norm(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. Length-normalized DPO (Tülu 3, arXiv 2411.15124): DPO with log-ratios a token."""
    chosen, rejected = _scores(pairs, loss)
    return -logsigmoid(_number(loss.beta) * (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens))


def exo_pair(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. EXO for pairs (arXiv 2402.00856), eq. 16: KL of the policy's preference from the label's, (1-ε, ε)."""
    logit, epsilon = _margin(pairs, loss), _number(loss.label_smoothing)
    chosen = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-epsilon))   # p_c (log p_c - log(1-ε))
    rejected = (-logit).sigmoid() * (logsigmoid(-logit) - math.log(epsilon))
    return chosen + rejected


def robust(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats, may be negative. Robust DPO (arXiv 2403.00409): unbiased if labels are flipped with probability ε."""
    logit, epsilon = _margin(pairs, loss), _number(loss.label_smoothing)
    kept, flipped = -logsigmoid(logit), -logsigmoid(-logit)
    return ((1 - epsilon) * kept - epsilon * flipped) / (1 - 2 * epsilon)   # ((1-ε) L(c,r) - ε L(r,c)) / (1 - 2ε)


def discopop(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. DiscoPOP (arXiv 2406.08414), eq. 5: logistic below margin 0, exponential above.

    Not monotone: between the two, within a few discopop_tau above margin 0, it rises.
    """
    logit = _margin(pairs, loss)
    gate = logit / _number(loss.discopop_tau)
    logistic = -logsigmoid(logit) * (-gate).sigmoid()                       # (1 - σ(ρ/τ)) · -log σ(ρ)
    exponential = (logsigmoid(gate) - logit).exp()                          # σ(ρ/τ) · e^-ρ, in logs: 0 · ∞ far below 0
    return logistic + exponential


def odpo(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. DPO with an offset (arXiv 2402.10571): the margin must exceed odpo_alpha · log(strength), the paper's
    f = log.

    So a strength of 1 (in the data's own unit) asks for no more than DPO, and less than 1 for less. Strengths must have
    passed check_strengths: looking here would wait for the GPU at every pack.
    """
    offset = _number(loss.odpo_alpha) * pairs.strength.to(pairs.policy_chosen.dtype).log()
    # -log σ(β (logratio_c - logratio_r) - α f(strength))
    return -logsigmoid(_margin(pairs, loss) - offset)


# ------------------------------------------------------------------------------- losses that know ties (PairLogps.tie)


def rao_kupper(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. DPO-RK (arXiv 2409.17431): DPO under the model of Rao and Kupper (1967), which knows ties.

    With d the margin, ν = tie_nu and α = log ν: P(chosen wins) = σ(d - α), P(rejected wins) = σ(-d - α) and P(tie) =
    (ν² - 1) σ(d - α) σ(-d - α), which is what is left of 1. A difference below about α is not seen by the annotator. At
    ν = 1 there are no ties and this is DPO. Both bad is a tie.
    """
    logit, nu = _margin(pairs, loss), _number(loss.tie_nu)
    alpha = math.log(nu)
    wins = logsigmoid(logit - alpha)                                        # log P(chosen wins)
    ties = (math.log(nu**2 - 1) if nu > 1 else -math.inf) + wins + logsigmoid(-logit - alpha)
    return -_of_outcome(pairs, wins, ties)


def davidson(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. DPO-D (arXiv 2409.17431): DPO under the model of Davidson (1970), which knows ties.

    With d the margin and ν = tie_nu: P(chosen wins) : P(rejected wins) : P(tie) = e^(d/2) : e^(-d/2) : 2ν (the paper's
    2ν, so that ν = 1 makes half of the judgments at d = 0 ties). Both bad is a tie.
    """
    half = _margin(pairs, loss) / 2
    tie = torch.full_like(half, math.log(2 * _number(loss.tie_nu)))
    total = torch.stack([half, -half, tie]).logsumexp(0)
    return total - _of_outcome(pairs, half, tie)


def _of_outcome(pairs: PairLogps, win: Tensor, tie: Tensor) -> Tensor:
    """(B,) `tie` of the pairs of which neither is better, `win` of the others."""
    return win if pairs.tie is None else torch.where(pairs.tie > 0, tie, win)


# ------------------------------------------------------------ losses of each completion by itself against the reference


def nca_pair(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. Noise contrastive alignment for pairs (arXiv 2402.05369), r = beta · logratio."""
    chosen, rejected = _implicit_rewards(pairs, loss)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. Binary classifier optimization (arXiv 2404.04656) without its reward shift, as in TRL."""
    chosen, rejected = _implicit_rewards(pairs, loss)
    return -logsigmoid(chosen) - logsigmoid(-rejected)                      # -log σ(r_c) - log σ(-r_r)


def sppo_hard(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats². SPPO (arXiv 2405.00675) with hard win probabilities 1 and 0, eta = 1/beta."""
    chosen, rejected = _logratios(pairs)
    half = 0.5 / _number(loss.beta)
    # (logratio - η (P(win) - 1/2))², both completions
    return (chosen - half).square() + (rejected + half).square()


def apo_zero(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) in (0, 2), no unit. APO-zero (arXiv 2408.06266), eq. 7: chosen more likely than before, rejected less."""
    chosen, rejected = _implicit_rewards(pairs, loss)
    return (-chosen).sigmoid() + rejected.sigmoid()                         # 1 - σ(r_c) + σ(r_r)


def apo_down(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) in (0, 2), no unit. APO-down (arXiv 2408.06266), eq. 8: both less likely than before, rejected more so."""
    chosen, rejected = _implicit_rewards(pairs, loss)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()                 # σ(r_c) + 1 - σ(r_c - r_r)


# ------------------------------------------------------------------------------------ losses of the step's distribution


def aot(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. Alignment by optimal transport, paired (arXiv 2406.05882): policy and reference margins of equal rank.

    B must be all pairs of the step and no fillers; pair weights play no part in the ranks. A pair's loss stands in its
    own place: its policy margin against the reference margin of the same rank. (The mean is that of two sorted lists.)
    """
    chosen, rejected = pairs.reference_chosen, pairs.reference_rejected
    assert chosen is not None and rejected is not None, "aot needs the reference's log-probs"
    margin = pairs.policy_chosen - pairs.policy_rejected
    return _cross_entropy(_number(loss.beta) * (margin - _of_equal_rank(chosen - rejected, margin)),
                          loss.label_smoothing)


def aot_unpaired(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. Alignment by optimal transport, unpaired (arXiv 2406.05882): chosen and rejected log-ratios of equal
    rank.

    B must be all pairs of the step and no fillers; pair weights play no part in the ranks. A loss stands in its
    chosen's place.
    """
    chosen, rejected = _logratios(pairs)
    return _cross_entropy(_number(loss.beta) * (chosen - _of_equal_rank(rejected, chosen)), loss.label_smoothing)


def _of_equal_rank(values: Tensor, like: Tensor) -> Tensor:
    """(B,) for each of `like`, the one of `values` that has the same rank. Gradient flows to `values`."""
    ranks = like.detach().argsort(stable=True).argsort()
    return values.sort(stable=True).values[ranks]


# ------------------------------------------------------------------------------------------- losses without a reference


def sft(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats a token: the negative log-likelihood of chosen over the step's mean chosen length.

    The weighted mean over the step's pairs is the weighted token mean over its chosen completions, however they were
    packed.
    """
    return -_whole(pairs)[0] / pairs.mean_chosen_tokens


def simpo(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. SimPO (arXiv 2405.14734), eq. 6: reward beta/|y| · log policy(y), margin simpo_gamma in its unit."""
    chosen, rejected = _token_means(pairs)
    return -logsigmoid(_number(loss.beta) * (chosen - rejected) - _number(loss.simpo_gamma))    # -log σ(r_c - r_r - γ)


def cpo(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. CPO (arXiv 2401.08417), eq. 3 with a uniform reference, plus cpo_alpha · sft; label_smoothing: cDPO.

    The likelihood term is a token mean, as in the authors' code and TRL, where the paper writes sums over the
    completion.
    """
    chosen, rejected = _whole(pairs)
    preference = _cross_entropy(_number(loss.beta) * (chosen - rejected), loss.label_smoothing)
    return preference + _number(loss.cpo_alpha) * sft(pairs, loss)


def orpo(pairs: PairLogps, loss: LossConfig) -> Tensor:
    """(B,) nats. ORPO (arXiv 2403.07691), eq. 6 and 7: sft + orpo_lambda · -log σ(log odds ratio) of token means.

    The likelihood term covers completion tokens only; TRL's also covers the prompt's.
    """
    chosen, rejected = _token_means(pairs)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)                # log odds_c / odds_r
    return sft(pairs, loss) - _number(loss.orpo_lambda) * logsigmoid(log_odds_ratio)


def _log_odds(logp: Tensor) -> Tensor:
    """(B,) nats: log(p / (1 - p)) from log p ≤ 0, to full precision at both ends (eq. 4)."""
    # p = 1 within fp32: large odds instead of infinite ones
    logp = logp.clamp(max=-(2.0 ** -24))
    half = math.log(0.5)
    log_rest = torch.where(logp < half, torch.log1p(-logp.clamp(max=half).exp()),
                           (-torch.expm1(logp.clamp(min=half))).log())
    return logp - log_rest


# Each loss of LOSS_OPTIONS is the function of its name above.
LOSSES: dict[str, Callable[[PairLogps, LossConfig], Tensor]] = {name: globals()[name] for name in LOSS_OPTIONS}
