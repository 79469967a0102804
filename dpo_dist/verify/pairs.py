"""Whether the tokenized pairs are those of the run: what a change of files, tokenizer or template comes to."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.digests import any_order, pair_digests
from dpo_dist.data.row_changes import gone_and_new
from dpo_dist.data.store import PairStore
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.runtime.without_torch import torch_hidden
from dpo_dist.verify.finding import SHOWN, Finding, Status, examples

BOTH = ("train", "eval")
WORDS = {"train": "training", "eval": "held-out"}


@dataclass(frozen=True)
class Split:
    """What became of the pairs that are trained on, or held out."""

    name: str                                # train or eval
    became: Literal["same", "reordered", "changed", "unknown"]
    pairs: int                               # then
    now: int = 0
    others: int = 0                          # of the pairs now, so many were not there
    gone: int = 0                            # of the pairs then, so many are not there now
    where: tuple[str, ...] = ()              # of some of them
    problem: str = ""                        # why it is not known

    def in_words(self, briefly: bool = False) -> str:
        """briefly: without examples and reasons."""
        word = WORDS[self.name]
        if self.became == "unknown":
            return f"the {word} pairs can no longer be made" + ("" if briefly else f": {self.problem}")
        if self.became == "same":
            return f"the same {self.pairs:,} {word} pairs, token for token"
        if self.became == "reordered":
            return f"the same {self.pairs:,} {word} pairs in another order"
        number = f" ({self.now:,} in all now)" if self.now != self.pairs else ""
        at = f" ({examples(self.where, self.others)})" if self.where and not briefly else ""
        if not (self.others or self.gone):
            return f"not the same {word} pairs: {self.pairs:,} then, {self.now:,} now"
        lost = f"{self.others:,} new or changed" if self.others else f"{self.gone:,} gone"
        return f"{lost} of {self.pairs:,} {word} pairs{number}{at}"

    def means(self, keep_best: str | None) -> tuple[Status, str]:
        """What that is for the numbers."""
        if self.became == "same":
            return "same", ""
        if self.name == "train":
            return "changed", {"unknown": "the run cannot be made again",
                               "reordered": "trained on in another order, so not the same weights",
                               "changed": "other weights"}[self.became]
        if self.became == "reordered":
            return "harmless", "their means do not depend on it, but for rounding"
        best = f", and with train.keep_best={keep_best} maybe another checkpoint" if keep_best else ""
        return "changed", {"unknown": "the held-out figures cannot be made again",
                           "changed": f"other held-out figures{best}; the weights of each step are the same"}[
                               self.became]


@dataclass(frozen=True)
class Change:
    """What became of something that the pairs are made of: a data set's files, the tokenizer's, the chat template."""

    what: str                                # data.train[0]
    splits: tuple[str, ...]                  # the pairs that it has a part in: train, eval
    says: str
    became: Literal["same", "changed", "missing", "unrecorded"] = "same"         # unrecorded: the run kept nothing
    details: dict[str, Any] = field(default_factory=dict)

    def finding(self, splits: Mapping[str, Split], keep_best: str | None) -> Finding:
        """Once it is known what the pairs became."""
        if self.became == "same":
            return Finding("same", self.what, self.says)
        status, means = effect([splits[name] for name in self.splits], keep_best)
        if self.became == "missing":
            return Finding("missing", self.what, self.says, means)
        if self.became == "unrecorded":
            return Finding("told", self.what, self.says, means)
        return Finding(status, self.what, self.says, means, self.details)


def unchanged(run: Mapping[str, Any]) -> dict[str, Split]:
    """Where files, tokenizer, template and config are the same, the pairs are."""
    passport = run["passport"]
    return {name: Split(name, "same", passport[f"{name}_pairs"]["count"]) for name in BOTH}


def made_again(run: Mapping[str, Any], config: RunConfig, kept: Kept) -> dict[str, Split]:
    """The pairs that the files, the tokenizer and the template give today, against those of the run. They are made in a
    folder that is removed."""
    with torch_hidden():
        from dpo_dist.data.prepare import prepare
        from dpo_dist.models.file_digests import tokenizer_digest
        from dpo_dist.models.resolve import resolve
        from dpo_dist.models.tokenizer import load_tokenizer
    counts = {name: run["passport"][f"{name}_pairs"]["count"] for name in BOTH}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = resolve(config.model.path, "model.path", offline=True).tokenizer
            stores = prepare(replace(config.data, cache_dir=folder), load_tokenizer(model), tokenizer_digest(model))
        except (UserError, OSError, ValueError) as error:
            return {name: Split(name, "unknown" if count else "same", count, problem=" ".join(str(error).split()))
                    for name, count in counts.items()}
        return {name: _compared(name, store, run["passport"], kept)
                for name, store in zip(BOTH, stores, strict=True)}


def _compared(name: str, store: PairStore, passport: Mapping[str, Any], kept: Kept) -> Split:
    wanted = passport[f"{name}_pairs"]
    if store.digest == wanted["digest"]:
        return Split(name, "same", wanted["count"])
    digests = pair_digests(store)
    if name not in kept.pairs:
        reordered = any_order(digests) == passport.get("splits", {}).get(name, {}).get("any_order")
        return Split(name, "reordered" if reordered else "changed", wanted["count"], len(store))
    gone, new, reordered = gone_and_new(kept.pairs[name], digests)
    if not (len(gone) or len(new)):
        return Split(name, "reordered" if reordered else "same", wanted["count"], len(store))
    return Split(name, "changed", wanted["count"], len(store), len(new), len(gone),
                 tuple(store[int(at)].where for at in new[:SHOWN]))


def decided(changes: Sequence[Change], splits: Mapping[str, Split], run: Mapping[str, Any]) -> dict[str, Split]:
    """The splits; one whose own part in the changes is none is as it was, even where another's can no longer be
    made."""
    same = unchanged(run)
    touched = {name for change in changes if change.became != "same" for name in change.splits}
    return {name: split if name in touched or split.became != "unknown" else same[name]
            for name, split in splits.items()}


def effect(splits: Sequence[Split], keep_best: str | None) -> tuple[Status, str]:
    """(the status of a change whose effect on the pairs is this, what it means)."""
    told = [(split, *split.means(keep_best)) for split in splits if split.pairs or split.now]
    if all(split.became == "same" for split, _, _ in told):
        return "harmless", "; ".join(split.in_words() for split, _, _ in told)
    status: Status = "changed" if any(status == "changed" for _, status, _ in told) else "harmless"
    return status, "; ".join(f"{split.in_words(briefly=True)}: {means}" for split, _, means in told
                             if split.became != "same")


def check_pairs(splits: Mapping[str, Split], again: bool, keep_best: str | None) -> Iterator[Finding]:
    """Findings on the pairs themselves."""
    for split in splits.values():
        if not (split.pairs or split.now):
            continue
        status, means = split.means(keep_best)
        how = "made again from the files" if again else "as files, tokenizer, template and config are the same"
        yield Finding(status, f"{WORDS[split.name]} pairs",
                      f"{split.in_words()} ({how})" if split.became == "same" else split.in_words(), means,
                      {"before": split.pairs, "now": split.now or split.pairs, "others": split.others,
                       "gone": split.gone, "became": split.became})
