"""Pairs that the reference itself finds too easy, or hopeless: by its log-probs, where the cache has them already."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.findings import Finding, finding
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.prepare import digests_folder, open_stores
from dpo_dist.data.store import PairStore
from dpo_dist.models.digest import folder_digest
from dpo_dist.models.resolve import ModelFolder, resolve
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey

LEAST_NATS = 1.0                             # a token, by which a pair must stand apart from the median ...
SPREADS = 6.0                                # ... and how many spreads of all pairs (1.48 MAD, a normal sigma)
LEAST_PAIRS = 30


def margins(config: RunConfig, store: Path) -> tuple[list[Finding], str]:
    """(too_easy and hopeless, what was looked at), of the pairs in the store of tokens in that folder."""
    if not store.is_dir():
        return [], "not looked at: the pairs are not tokenized yet"
    if not config.loss.needs_reference:
        return [], f"not looked at: loss.name={config.loss.name} uses no reference"
    train = open_stores(store)[0]
    best: NDArray[np.float64] | None = None
    for cache in _caches(config):
        found = _nats_a_token(train, cache)
        if best is None or np.isfinite(found).sum() > np.isfinite(best).sum():
            best = found
    n = 0 if best is None else int(np.isfinite(best).sum())
    if best is None or not n:
        return [], ("not looked at: the reference has not scored these pairs yet (after dpo-dist score, remove "
                    "audit.json and audit again)")
    looked_at = f"{n:,} of {len(train):,} pairs, by the reference's log-probs in {config.reference.cache_dir}"
    return list(_apart(train, best)) if n >= LEAST_PAIRS else [], looked_at


def _caches(config: RunConfig) -> Iterator[LogpCache]:
    """The caches of this reference's weights, of whatever dtype and recipe."""
    keys = [ReferenceKey(**json.loads(file.read_text()))
            for file in Path(config.reference.cache_dir).glob("*/key.json")]
    if not keys:
        return
    folder = resolve(config.reference_path, "reference.path", config.run.offline)
    digest = folder_digest(ModelFolder(folder.base) if config.reference.bare_base else folder,
                           digests_folder(config.data))
    for key in keys:
        if key.weights == digest:
            cache = LogpCache(config.reference.cache_dir, key)
            cache.open_shards(cache.verified_shards()[0])
            yield cache


def _nats_a_token(train: PairStore, cache: LogpCache) -> NDArray[np.float64]:
    """(pairs,) mean log-prob of chosen's tokens less that of rejected's; NaN where it was not scored."""
    out = np.full(len(train), np.nan)
    for at in range(len(train)):
        prompt, chosen, rejected = train.parts(at)
        try:
            out[at] = cache.logps(prompt, chosen).mean() - cache.logps(prompt, rejected).mean()
        except KeyError:
            continue
    return out


def _apart(train: PairStore, nats: NDArray[np.float64]) -> Iterator[Finding]:
    known = np.flatnonzero(np.isfinite(nats))
    middle = float(np.median(nats[known]))
    spread = 1.4826 * float(np.median(np.abs(nats[known] - middle)))
    bound = max(LEAST_NATS, SPREADS * spread)
    for kind, sign in (("too_easy", 1), ("hopeless", -1)):
        found = known[sign * (nats[known] - middle) > bound]
        found = found[np.argsort(-sign * nats[found], kind="stable")]
        if len(found):
            yield finding(kind, len(found), len(known), [train[at].where for at in found[:50].tolist()],
                          median_nats_a_token=round(middle, 4), apart_by=round(bound, 4))
