"""Which options each loss uses, with their defaults. Torch-free, so that config errors are instant; the losses are in losses.py."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIXTURE = "mixture"


@dataclass(frozen=True)
class LossOptions:
    defaults: dict[str, Any]
    needs_reference: bool = True
    needs_whole_step: bool = False


# Options that reshape the log-ratio (f_divergence, f_alpha), the log-probs (ld_alpha) or the weight of a pair (wpo) work
# with every loss of the chosen and the rejected log-ratio.
_RATIO: dict[str, Any] = {"beta": 0.1, "f_divergence": "reverse_kl", "f_alpha": None, "ld_alpha": None, "wpo": False}

LOSS_OPTIONS: dict[str, LossOptions] = {
    "sigmoid": LossOptions({**_RATIO, "label_smoothing": 0.0}),
    "hinge": LossOptions(_RATIO),
    "ipo": LossOptions(_RATIO),
    "exo_pair": LossOptions({**_RATIO, "label_smoothing": 0.001}),
    "nca_pair": LossOptions(_RATIO),
    "robust": LossOptions({**_RATIO, "label_smoothing": 0.1}),
    "bco_pair": LossOptions(_RATIO),
    "sppo_hard": LossOptions(_RATIO),
    "aot": LossOptions({"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None}, needs_whole_step=True),
    "aot_unpaired": LossOptions({"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None}, needs_whole_step=True),
    "apo_zero": LossOptions(_RATIO),
    "apo_down": LossOptions(_RATIO),
    "discopop": LossOptions({**_RATIO, "discopop_tau": 0.05}),
    "sigmoid_norm": LossOptions(_RATIO),
    "odpo": LossOptions({**_RATIO, "odpo_alpha": 1.0}),
    "sft": LossOptions({}, needs_reference=False),
    "simpo": LossOptions({"beta": 2.0, "simpo_gamma": 1.0}, needs_reference=False),
    "orpo": LossOptions({"orpo_lambda": 0.1}, needs_reference=False),
    "cpo": LossOptions({"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0}, needs_reference=False),
}
