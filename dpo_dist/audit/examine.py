"""All that an audit finds, from what was read."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.audit.bias import length_bias, position_bias, style_bias
from dpo_dist.audit.facts import TRAIN, Facts
from dpo_dist.audit.findings import KINDS, SEVERITIES, Finding, finding
from dpo_dist.audit.judgments import flagged, judged_twice, undecided
from dpo_dist.audit.margins import margins
from dpo_dist.audit.mixture import language_mix, prompts, source_imbalance
from dpo_dist.audit.reading import Read, sources_of
from dpo_dist.audit.tokens import NO_END, NO_TEMPLATE, TWO_BEGINNINGS, TWO_ENDS, TokenFacts
from dpo_dist.config.schema import RunConfig

SYSTEMATIC = 0.1                             # of the pairs with a fault of the template: it is the template's


def examine(config: RunConfig, read: Read, store: Path) -> tuple[list[Finding], dict[str, str]]:
    """(findings, the gravest first; what each group of kinds has looked at). store: where the tokens of these pairs
    are, or will be."""
    facts, sources = read.facts(), sources_of(config)
    split = np.array([source.split for source in sources])
    of_training = np.flatnonzero(split[facts.data_set] == TRAIN)
    # of a tie that is kept, chosen and rejected are names alone
    judged = of_training[facts.tie[of_training] == 0]
    names = [source.name for source in sources]
    weights = [source.config.weight if source.split == TRAIN else 0.0 for source in sources]
    by_reference, looked_at_by_reference = margins(config, store)
    found = [*judged_twice(facts, judged), *undecided(facts, of_training, read.identical), *flagged(facts, of_training),
             *prompts(facts, of_training, names, read.tokens.held_out), *length_bias(facts, judged),
             *style_bias(facts, judged), *position_bias(facts, judged), *language_mix(facts, of_training),
             *source_imbalance(facts, of_training, names, weights), *_of_tokens(config, read.tokens), *by_reference]
    order = list(KINDS)
    found.sort(key=lambda f: (-SEVERITIES.index(f.severity), order.index(f.kind)))
    return found, {"rows and texts": f"all {len(facts):,} pairs, {len(facts.prompt):,} prompts",
                   "tokens (truncation_loss, template_fault)": _tokens_looked_at(read.tokens),
                   "leakage": _leakage_looked_at(config, read.tokens, facts),
                   "reference (too_easy, hopeless)": looked_at_by_reference,
                   "order (position_bias)": f"{int(np.count_nonzero(facts.order[judged])):,} pairs whose answers stand "
                                            "in an order of their own"}


def _of_tokens(config: RunConfig, tokens: TokenFacts) -> Iterator[Finding]:
    if tokens.too_long:
        yield finding("truncation_loss", len(tokens.too_long), tokens.looked_at, tokens.too_long,
                      max_length=config.data.max_length, truncation=config.data.truncation,
                      tokens_beyond=round(tokens.lost / max(1, tokens.tokens), 6))
    if tokens.faults:
        places = list(dict.fromkeys(where for wheres in tokens.faults.values() for where in wheres))
        of = max(tokens.looked_at, len(places))
        # rows that the template refuses are never trained on: the reader refuses them too, or leaves them out
        trained_on = sum(len(tokens.faults.get(name, ())) for name in (TWO_BEGINNINGS, TWO_ENDS, NO_END))
        grave = NO_TEMPLATE in tokens.faults or trained_on >= max(1, SYSTEMATIC * of)
        why: dict[str, Any] = {"why": tokens.unusable} if tokens.unusable else {}
        yield finding("template_fault", len(places), of, places, "error" if grave else "warning",
                      faults={name: len(wheres) for name, wheres in tokens.faults.items()}, **why)


def _tokens_looked_at(tokens: TokenFacts) -> str:
    if tokens.unusable and not tokens.faults:
        return f"not looked at: {tokens.unusable}"
    if tokens.left:
        return f"{tokens.looked_at:,} of {tokens.looked_at + tokens.left:,} pairs, chosen by their content"
    return f"all {tokens.looked_at:,} pairs"


def _leakage_looked_at(config: RunConfig, tokens: TokenFacts, facts: Facts) -> str:
    others = int((facts.split != TRAIN).sum())
    if config.data.eval_fraction and tokens.left:
        return (f"{others:,} prompts of other data sets; of data.eval_fraction those among the "
                f"{tokens.looked_at:,} pairs that were tokenized")
    if config.data.eval_fraction:
        return f"{others + len(tokens.held_out):,} held-out and benchmark prompts, data.eval_fraction's among them"
    return f"{others:,} held-out and benchmark prompts" if others else "not looked at: no prompts are held out"
