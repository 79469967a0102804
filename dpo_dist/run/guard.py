"""What the guards see in a run's numbers: displacement, growing answers, repeating answers. Pure functions; no torch.

Each returns a Finding, or None where all is well. When a finding is told, kept and acted on: guard_log.py.
"""
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo_dist.stats.intervals import mean_interval

Name = Literal["displacement", "length", "repetition"]

# Displacement. An answer that loses 0.25 nats a token has each of its tokens a fifth less likely (e^-0.25 = 0.78), and
# one of 100 tokens is 10^11 times less likely as a whole. Sound runs stay above it: benchmarks/displacement.py measures
# some.
FALL_BOUND = 0.25                        # nats a token
# ... of held-out pairs whose margins do not rise: what is learned by heart says less and less of other pairs, which is
# another matter, until each of their tokens is e times less likely
COLLAPSE_BOUND = 1.0
ROWS_AT_ONCE = (1, 2, 4, 8, 16)          # over how many rows of training the fall is averaged
NOISE_FLOOR = 0.08                       # nats a token: the least standard deviation that a row is taken to have
ROWS_FOR_NOISE = 64                      # rows before those, from which their scatter is told
FEWEST_ROWS = 5                          # that tell a scatter
SIGMAS = 3.0                             # a run has hundreds of rows, and each is a chance to be wrong

# Length. DPO is known to lengthen answers beyond what people prefer (arXiv 2403.19159); a quarter is more than the
# scatter between evaluations of one model, as the interval shows, and less than the doubling that is reported there.
GROWTH_BOUND = 1.25                      # times the tokens before training
# Repetition: one 4-gram in ten that was not a repeat before. Human text has about one in a hundred, text of models that
# loop four in ten (arXiv 1908.04319, seq-rep-4).
REPETITION_BOUND = 0.10
GRAM = 4
FEWEST_PROMPTS = 4                       # below which the interval of a mean says nothing
LONG_WORD = 16                           # characters, beyond which a word is taken character by character


@dataclass(frozen=True)
class Finding:
    """What a guard saw."""

    step: int
    guard: Name
    value: float                         # nats a token; times as long; share of repeats, more than before
    bound: float
    what: str                            # for a person, with the numbers
    held_out: bool = True                # told from held-out pairs, or from those trained on


@dataclass(frozen=True)
class Level:
    """A row of metrics as displacement is told from it."""

    step: int
    chosen: float                        # how much likelier chosen became since the start, nats a token
    margin: float                        # of the rewards


def displacement(rows: Sequence[Level], start_margin: float) -> Finding | None:
    """Whether the newest rows of training show that chosen answers lost likelihood (arXiv 2410.08847).

    Each row is of other pairs. So the fall is averaged over the newest 1, 2, 4, ... rows, and some average must be
    below -FALL_BOUND by SIGMAS standard errors: a steep fall is told from a single row, a slow one once enough rows
    agree. A row's scatter is that of the rows before those averaged. Margins tell the two ways apart, displacement and
    divergence; they do not decide, as at a learning rate that is far too high they jump about.
    """
    for count in ROWS_AT_ONCE:
        newest, earlier = rows[-count:], rows[:-count][-ROWS_FOR_NOISE:]
        if count > 1 and len(earlier) < FEWEST_ROWS:
            break
        level = _mean([row.chosen for row in newest])
        error = _scatter([row.chosen for row in earlier]) / math.sqrt(count)
        over = "" if count == 1 else f", the mean of {count} rows"
        now = Level(newest[-1].step, level, _mean([row.margin for row in newest]))
        if level + SIGMAS * error < -FALL_BOUND:
            return _fallen(now, start_margin, FALL_BOUND, f"on the pairs trained on{over}", held_out=False)
    return None


def held_out_displacement(before: Level, now: Level) -> Finding | None:
    """Whether the held-out pairs' chosen answers lost likelihood. They are the same pairs each time: no scatter."""
    level = Level(now.step, now.chosen - before.chosen, now.margin)
    bound = FALL_BOUND if now.margin > before.margin else COLLAPSE_BOUND
    return _fallen(level, before.margin, bound, "on held-out pairs", held_out=True) if level.chosen < -bound else None


def _fallen(now: Level, start_margin: float, bound: float, where: str, held_out: bool) -> Finding:
    how = ("while the margins rise" if now.margin > start_margin
           else "and the margins do not rise: the run diverges")
    return Finding(now.step, "displacement", now.chosen, -bound, (
        f"the chosen answers lose likelihood {how}: {-now.chosen:.2f} nats a token less likely than at the start "
        f"{where} (bound {bound}); margin {start_margin:.3g} → {now.margin:.3g}"), held_out)


def _scatter(values: Sequence[float]) -> float:
    """The standard deviation of values around a line that may be steep: from second differences, whose median no single
    jump moves. At least NOISE_FLOOR."""
    if len(values) < FEWEST_ROWS:                        # a run begins at 0, without scatter
        return NOISE_FLOOR
    # a second difference of independent values has 6 times their variance; 0.6745: the median of |N(0, 1)|
    second = np.abs(np.diff(np.array(values), 2))
    return max(float(np.median(second)) / (0.6745 * math.sqrt(6)), NOISE_FLOOR)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------- generated answers


def growth(step: int, before: Sequence[int], now: Sequence[int]) -> Finding | None:
    """Whether answers to the same prompts have more tokens than before: the lower end of the 95 % interval of their
    mean growth is above the bound."""
    ratio = _mean(now) / max(_mean(before), 1.0)
    low, high = (1 + end / max(_mean(before), 1.0) for end in paired_interval(before, now))
    if low <= GROWTH_BOUND:
        return None
    return Finding(step, "length", ratio, GROWTH_BOUND, (
        f"the answers to held-out prompts grow: {_mean(now):.0f} tokens, {_mean(before):.0f} before training "
        f"({ratio:.2f} times, 95 % interval {low:.2f} to {high:.2f}, bound {GROWTH_BOUND})"))


def repeating(step: int, before: Sequence[float], now: Sequence[float]) -> Finding | None:
    """Whether answers to the same prompts repeat themselves more than before: the lower end of the 95 % interval of the
    mean difference is above the bound."""
    low, high = paired_interval(before, now)
    if low <= REPETITION_BOUND:
        return None
    more = _mean(now) - _mean(before)
    return Finding(step, "repetition", more, REPETITION_BOUND, (
        f"the answers to held-out prompts repeat themselves: {_mean(now):.0%} of their {GRAM}-grams stood there "
        f"before, {_mean(before):.0%} before training (more by {low:.2f} to {high:.2f}, bound {REPETITION_BOUND})"))


def paired_interval(before: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of now - before over prompts, by Student's t; infinite below FEWEST_PROMPTS."""
    found = mean_interval(np.asarray(now, dtype=np.float64) - np.asarray(before, dtype=np.float64))
    return (-math.inf, math.inf) if found is None or found.n < FEWEST_PROMPTS else (found.low, found.high)


def repetition(answer: str | Sequence[int]) -> float:
    """The share of an answer's 4-grams that are repeats of an earlier one: 1 - distinct / all, seq-rep-4 of Welleck et
    al. (arXiv 1908.04319); 0 where there is none. Of token ids, or of a text's words and signs: what has no spaces,
    as Chinese or a run of one letter, is taken by characters."""
    units = _units(answer) if isinstance(answer, str) else list(answer)
    grams = [tuple(units[i:i + GRAM]) for i in range(len(units) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")


def _units(text: str) -> list[str]:
    words = _UNIT.findall(text)
    return [unit for word in words for unit in (word if len(word) > LONG_WORD else [word])]
