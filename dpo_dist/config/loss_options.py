"""What each loss is: its options with their defaults, what data it needs, and what it rewards.

Torch-free, so that config errors are instant; the losses themselves are the functions of the same names in losses.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MIXTURE = "mixture"


@dataclass(frozen=True)
class LossOptions:
    defaults: dict[str, Any]
    needs_reference: bool = True
    needs_whole_step: bool = False             # a pair's loss depends on the other pairs of the step
    uses_rejected: bool = True
    needs_strength: bool = False               # how much better chosen is than rejected, of every pair
    needs_smoothing: bool = False              # label_smoothing above 0
    knows_ties: bool = False                   # has a likelihood for pairs of which neither is better (data.ties=keep)
    # The implicit reward of a loss without a reference: the value of this option, times the completion's log-prob, as
    # a sum over its tokens or as their mean.
    reward_scale: str | None = None
    reward_of: Literal["sum", "token mean"] = "token mean"


# Options of the losses that compare policy and reference on single pairs: ld_alpha shortens the log-probs, wpo weights
# the pair. In a mixture an option acts on the terms that list it, and on no other.
_PAIR: dict[str, Any] = {"beta": 0.1, "ld_alpha": None, "wpo": False}

# Under an f-divergence a completion's reward is beta f'(policy / reference) plus a term of the prompt alone. So the
# divergence is an option of those losses in which that term cancels, those of the difference between completions (TRL
# draws the same line).
_DIFFERENCE: dict[str, Any] = {**_PAIR, "f_divergence": "reverse_kl", "f_alpha": None}

LOSS_OPTIONS: dict[str, LossOptions] = {
    "sigmoid": LossOptions({**_DIFFERENCE, "label_smoothing": 0.0}),
    "hinge": LossOptions(_DIFFERENCE),
    "ipo": LossOptions(_DIFFERENCE),
    "exo_pair": LossOptions({**_DIFFERENCE, "label_smoothing": 0.001}, needs_smoothing=True),
    "nca_pair": LossOptions(_PAIR),
    "robust": LossOptions({**_DIFFERENCE, "label_smoothing": 0.1}, needs_smoothing=True),
    "bco_pair": LossOptions(_PAIR),
    "sppo_hard": LossOptions(_PAIR),
    "aot": LossOptions({"beta": 0.1, "label_smoothing": 0.0}, needs_whole_step=True),
    "aot_unpaired": LossOptions({"beta": 0.1, "label_smoothing": 0.0}, needs_whole_step=True),
    "apo_zero": LossOptions(_PAIR),
    "apo_down": LossOptions(_PAIR),
    "discopop": LossOptions({**_DIFFERENCE, "discopop_tau": 0.05}),
    # of log-ratios a token, which are small: beta as in Tülu 3 and OLMo 3 (arXiv 2411.15124, 2512.13961)
    "sigmoid_norm": LossOptions({**_DIFFERENCE, "beta": 5.0}),
    "odpo": LossOptions({**_DIFFERENCE, "odpo_alpha": 1.0}, needs_strength=True),
    # tie_nu as in the paper (arXiv 2409.17431): where both are equally good, half of the judgments are ties
    "rao_kupper": LossOptions({**_DIFFERENCE, "tie_nu": 3.0}, knows_ties=True),
    "davidson": LossOptions({**_DIFFERENCE, "tie_nu": 1.0}, knows_ties=True),
    "sft": LossOptions({}, needs_reference=False, uses_rejected=False),
    "simpo": LossOptions({"beta": 2.0, "simpo_gamma": 1.0}, needs_reference=False, reward_scale="beta"),
    "orpo": LossOptions({"orpo_lambda": 0.1}, needs_reference=False, reward_scale="orpo_lambda"),
    "cpo": LossOptions({"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0}, needs_reference=False,
                       reward_scale="beta", reward_of="sum"),
}
