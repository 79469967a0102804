"""Style by name: what an answer looks like whatever it says, and a small, shown classifier on it."""
from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
HEAD_CHARS = 200                             # of an answer, in which openings are sought
TAIL_CHARS = 300                             # and closings
NAMED: dict[str, re.Pattern[str]] = {
    "heading": re.compile(r"^#{1,6} \S", re.M),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
    "bullets": re.compile(r"^[ \t]*[-*\u2022] \S", re.M),
    "numbered list": re.compile(r"^[ \t]*\d{1,2}[.)] \S", re.M),
    "code": re.compile(r"```|`[^`\n]+`"),
    "table": re.compile(r"^\|.*\|[ \t]*$", re.M),
    "link": re.compile(r"https?://"),
    "emoji": re.compile(r"[\u2600-\u27bf\U0001f300-\U0001faff]"),
    "exclamation mark": re.compile(r"!"),
    "question mark": re.compile(r"\?"),
    "formula": re.compile(r"\$[^$\n]+\$|\\\(|\\\["),
}
AT_START: dict[str, re.Pattern[str]] = {
    "opening: agrees": re.compile(r"\s*(sure|certainly|of course|absolutely|definitely|yes|great|okay|ok)\b", re.I),
    "opening: flatters": re.compile(r"\s*(that's |what )?an? (great|good|excellent|interesting) (question|point|idea)"
                                    r"|\s*(great|good|excellent) question", re.I),
    "opening: apologizes": re.compile(r"\s*((i'?m|i am) (very |so |really )?(sorry|afraid)|i apologi[sz]e|sorry\b"
                                      r"|my apologies|unfortunately)", re.I),
    "refusal": re.compile(r"\b(i (can ?not|can'?t|won'?t|am not able|am unable|could not)|i'm (not able|unable)"
                          r"|not (appropriate|able to (help|assist|provide)))\b", re.I),
    "as a language model": re.compile(r"\bas an? (ai|artificial|(large )?language model|assistant)\b", re.I),
}
AT_END: dict[str, re.Pattern[str]] = {
    "closing: offers more": re.compile(r"let me know|feel free to|happy to help|hope (this|that|it) helps"
                                       r"|any (other|more|further) questions", re.I),
}
FEATURES = (*NAMED, *AT_START, *AT_END)
FOLDS = 5
RIDGE = 1.0                                  # of a weight: about as much as one pair against it
NEWTON_STEPS = 12


def features_of(text: str) -> list[bool]:
    """(len(FEATURES),) which of them an answer has."""
    head, tail = text[:HEAD_CHARS].replace("\u2019", "'"), text[-TAIL_CHARS:]
    return [*(pattern.search(text) is not None for pattern in NAMED.values()),
            *((pattern.match if name.startswith("opening") else pattern.search)(head) is not None
              for name, pattern in AT_START.items()),
            *(pattern.search(tail) is not None for pattern in AT_END.values())]


@dataclass(frozen=True)
class Judge:
    """A logistic regression on differences (chosen minus rejected), fitted on the other folds than it judges."""

    weights: Array                           # (F,) mean over the folds
    scores: Array                            # (n,) above 0 where it takes chosen for the better one


def fit_judge(differences: Array, nuisance: Array, folds: NDArray[np.int64]) -> Judge:
    """The judge of (n, F) differences. nuisance: (n, K) differences that are fitted beside them and left out of the
    scores. folds: (n,) in [0, FOLDS)."""
    both = np.concatenate([differences, nuisance], axis=1)
    scores, weights = np.zeros(len(both)), np.zeros((FOLDS, both.shape[1]))
    n = differences.shape[1]
    for fold in range(FOLDS):
        weights[fold] = _fit(both[folds != fold])
        held_out = folds == fold
        scores[held_out] = differences[held_out] @ weights[fold, :n]
    return Judge(weights[:, :n].mean(0), scores)


def _fit(x: Array) -> Array:
    """The weights w that maximize sum(log sigmoid(x w)) - RIDGE/2 |w|²: Newton's method. No intercept: a pair's sides
    could be named the other way round."""
    w = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(np.clip(x @ w, -30, 30)))                # how far from sure
        gradient = x.T @ p - RIDGE * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w = w + step
        if np.abs(step).max(initial=0.0) < 1e-6:
            break
    return w
