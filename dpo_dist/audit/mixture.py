"""What the set is made of: prompts that repeat or leak, languages, sources."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.facts import ASKS, BENCHMARK, HELD_OUT, LANGUAGES, TRAIN, Facts
from dpo_dist.audit.findings import Finding, Severity, finding
from dpo_dist.audit.near import near_prompts

MAIN_LANGUAGE = 0.8                          # share of the pairs whose language is known: a set of one language
FEW = 0.05                                   # ... in which others are few
OUTWEIGHS = 10                               # times, that one source counts more than another: an alarm
SOME = 3                                     # times, that are worth telling
Places = NDArray[np.int64]


def prompts(facts: Facts, judged: Places, names: Sequence[str], held_out: set[int]) -> Iterator[Finding]:
    """near_duplicate_prompt and leakage. names: of all data sets; held_out: hashes of prompts that
    data.eval_fraction holds out of the training data."""
    near = near_prompts(facts)
    split = facts.split.astype(np.int64)
    if held_out:
        split = np.where((split == TRAIN) & np.isin(facts.prompt, np.array(sorted(held_out), "<u8")), HELD_OUT, split)
    a, b = near.T
    within = near[(split[a] == TRAIN) & (split[b] == TRAIN)]
    if len(within):
        later, first = np.unique(within[:, 1], return_index=True)
        yield finding("near_duplicate_prompt", len(later), int((split == TRAIN).sum()),
                      [facts.prompt_where(at) for at in later.tolist()[:50]],
                      same_as=[facts.prompt_where(at) for at in within[first, 0].tolist()[:20]])
    across = near[(split[a] == TRAIN) != (split[b] == TRAIN)]
    across = np.where((split[across[:, :1]] == TRAIN), across, across[:, ::-1])  # (train, other)
    if (found := _leakage(facts, judged, split, across, held_out)) is not None:
        yield found


def _leakage(facts: Facts, judged: Places, split: NDArray[np.int64], across: Places,
             held_out: set[int]) -> Finding | None:
    """Pairs to train on whose prompt, or nearly the same one, is held out or of a benchmark."""
    own = facts.content[judged, 0]
    trained = judged if not held_out else judged[~np.isin(own, np.array(sorted(held_out), "<u8"))]
    own = facts.content[trained, 0]
    apart = facts.split != TRAIN                         # what eval_fraction holds out never has the very same prompt
    exact_hashes = facts.prompt[apart]
    exact = np.isin(own, exact_hashes)
    nearly = np.isin(own, facts.prompt[across[:, 0]]) & ~exact
    if not exact.any() and not nearly.any():
        return None
    of = {}
    for name, which in (("held_out", HELD_OUT), ("benchmark", BENCHMARK)):
        near = across[split[across[:, 1]] == which, 0]
        hashes = np.concatenate([facts.prompt[facts.split == which], facts.prompt[near]])
        of[name] = int(np.isin(own, hashes).sum())
    pairs = np.concatenate([trained[exact], trained[nearly]])
    same_as = [_counterpart(facts, int(h), apart, across) for h in facts.content[pairs[:20], 0]]
    # Some of the very prompts are a mistake; ones that are nearly the same may be chance; and where all of them are
    # trained on, the training set itself is evaluated, which its user knows.
    severity: Severity = "error" if exact.any() and not np.isin(exact_hashes, own).all() else "warning"
    return finding("leakage", len(pairs), len(trained), facts.wheres(pairs), severity,
                   same=int(exact.sum()), nearly_the_same=int(nearly.sum()), **of, same_as=same_as)


def _counterpart(facts: Facts, prompt: int, apart: NDArray[np.bool_], across: Places) -> str:
    same = np.flatnonzero(apart & (facts.prompt == prompt))
    if len(same):
        return facts.prompt_where(int(same[0]))
    return facts.prompt_where(int(across[facts.prompt[across[:, 0]] == prompt, 1][0]))


def language_mix(facts: Facts, judged: Places) -> Iterator[Finding]:
    prompt, chosen, rejected = facts.language[judged].T
    asks = facts.has(ASKS)[judged]

    def differ(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return (a > 0) & (b > 0) & (a != b)

    answers = differ(chosen, rejected)
    asked = (differ(prompt, chosen) | differ(prompt, rejected)) & ~asks
    main = np.where(prompt > 0, prompt, chosen)
    known = np.bincount(main, minlength=len(LANGUAGES))
    known[0] = 0
    few = np.zeros(len(judged), dtype=bool)
    if known.sum() and known.max() >= MAIN_LANGUAGE * known.sum():
        rare = (known > 0) & (known <= FEW * known.sum())
        few = rare[main]
    # a question about a language holds its words: no pair of another language
    few &= ~asks | (prompt == chosen)
    found = judged[answers | asked | few]
    if len(found):
        yield finding("language_mix", len(found), len(judged), facts.wheres(found),
                      answers_differ=int(answers.sum()), prompt_differs=int(asked.sum()), few=int(few.sum()),
                      languages={LANGUAGES[at]: int(known[at]) for at in np.argsort(-known, kind="stable")[:10]
                                 if known[at]})


def source_imbalance(facts: Facts, judged: Places, names: Sequence[str], weights: Sequence[float]) -> Iterator[Finding]:
    """Among data sets by name; `weights` are data.train[].weight."""
    counts = np.bincount(facts.data_set[judged], minlength=len(names)).astype(float)
    of_training = [at for at, weight in enumerate(weights) if weight > 0]
    if len(of_training) < 2:
        return
    says = {names[at]: counts[at] * weights[at] for at in of_training}
    most, least = max(says.values()), min(says.values())
    if most < SOME * least or not most:
        return
    small = [at for at in of_training if says[names[at]] * SOME <= most]
    pairs = judged[np.isin(facts.data_set[judged], small)]
    total = sum(says.values())
    details: dict[str, Any] = {"shares": {name: round(value / total, 4) for name, value in says.items()}}
    severity: Severity = "warning" if most >= OUTWEIGHS * least else "info"
    yield finding("source_imbalance", len(pairs), len(judged), facts.wheres(pairs), severity, **details)
