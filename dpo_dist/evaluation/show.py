"""A summary in a few lines, for a person at a terminal."""
from __future__ import annotations

from typing import Any

from dpo_dist.evaluation.summary import Summary

MOST_FLAGGED = 5


def summary_lines(summary: Summary) -> list[str]:
    """Accuracy beside its baselines, calibration, displacement, RewardBench, and slices that are different."""
    lines = []
    if summary["accuracy"]:
        baselines = summary["baselines"]
        lines.append(f"accuracy {interval(summary['accuracy'])}, where chosen is shorter "
                     f"{interval(summary['length_controlled'])}")
        lines.append(f"  beside: the longer answer {interval(baselines['length'])}, the reference's likelihood "
                     f"{interval(baselines['reference'])}")
    lines += _calibration(summary["calibration"])
    if (moved := summary["displacement"]) is not None:
        than = "under the reference" if moved["since"] == "reference" else "before training"
        lines.append(f"displacement: chosen {_number(moved['chosen_per_token'], '+.3f')}, rejected "
                     f"{_number(moved['rejected_per_token'], '+.3f')} nats a token; chosen less likely than {than} in "
                     f"{moved['share_chosen_falling']['value']:.0%} of the pairs")
    if (bench := summary["rewardbench"]) is not None:
        sections = ", ".join(f"{name} {found['value']:.3f}" for name, found in bench["sections"].items())
        missing = f" ({len(bench['missing'])} subsets have no pairs)" if bench["missing"] else ""
        lines.append(f"RewardBench {interval(bench['score'])}: {sections}{missing}")
    if (kl := summary["kl"]) is not None:
        lines.append(f"KL(policy || reference) {kl['per_answer']['value']:.2f} ({kl['per_answer']['low']:.2f} to "
                     f"{kl['per_answer']['high']:.2f}) nats an answer, from {kl['answers']} samples")
    return [*lines, *_slices(summary["slices"])]


def interval(found: dict[str, Any] | None) -> str:
    """As in 0.713 (0.682 to 0.742)."""
    return "-" if found is None else f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _calibration(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    line = f"calibration: ECE {found['ece']:.3f} (chance alone: up to {found['ece_by_chance']:.3f})"
    beta, best = found["beta"], found["calibrating_beta"]
    if beta is not None and best is not None and found["calibrating_beta_high"] is not None:
        low, high = found["calibrating_beta_low"], found["calibrating_beta_high"]
        says = "fits" if low <= beta <= high else "claims too much" if best < beta else "claims too little"
        line += f"; beta {beta:g} {says}: {f'{low:.3g} to' if low else 'at most'} {high:.3g} would calibrate it"
    return [line]


def _slices(slices: list[dict[str, Any]]) -> list[str]:
    flagged = sorted((one for one in slices if one["flagged"]), key=lambda one: one["difference"])
    lines = [f"slice {one['by']}={one['value']}: {interval(one['accuracy'])} of {one['n']}, "
             f"{_number(one['difference'], '+.3f')} beside the rest (p {one['p_corrected']:.2g} after correction)"
             for one in flagged[:MOST_FLAGGED]]
    if len(flagged) > MOST_FLAGGED:
        lines.append(f"and {len(flagged) - MOST_FLAGGED} more slices that are different")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
