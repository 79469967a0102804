"""Pairs that the reference itself finds too easy, or hopeless: by its log-probs, where the cache has them already.

Which values are this reference's is told by a digest of its weights, for which torch is needed. So this is a process of
its own, started only where there are values at all: python -m dpo_dist.audit.margins STORE, with the config as JSON on
its standard input and what was found on its standard output.
"""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.findings import Finding, finding
from dpo_dist.config.decode import decode
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.prepare import digests_folder, open_stores
from dpo_dist.data.store import PairStore
from dpo_dist.models.resolve import ModelFolder, resolve
from dpo_dist.reference.cache.store import LogpCache, described_keys
from dpo_dist.runtime.checksums import damage

LEAST_NATS = 1.0                             # a token, by which a pair must stand apart from the median ...
SPREADS = 6.0                                # ... and how many spreads of all pairs (1.48 MAD, a normal sigma)
LEAST_PAIRS = 30
NOT_SCORED = ("not looked at: the reference has not scored these pairs yet (after dpo-dist score, remove audit.json "
              "and audit again)")


def margins(config: RunConfig, store: Path) -> tuple[list[Finding], str]:
    """(too_easy and hopeless, what was looked at), of the pairs in the store of tokens in that folder."""
    if not config.loss.needs_reference:
        return [], f"not looked at: loss.name={config.loss.name} uses no reference"
    if not store.is_dir():
        return [], "not looked at: the pairs are not tokenized yet"
    if not any(Path(config.reference.cache_dir).glob("*/*.safetensors")):
        return [], NOT_SCORED
    done = subprocess.run([sys.executable, "-m", "dpo_dist.audit.margins", str(store)],
                          capture_output=True, text=True, input=json.dumps(to_dict(config)))
    if done.returncode:
        raise RuntimeError(f"the process that reads the reference's values ended with code {done.returncode}: "
                           f"{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Finding(**entry) for entry in found["findings"]], found["looked_at"]


def _found(config: RunConfig, store: Path) -> tuple[list[Finding], str]:
    if wrong := damage(store):
        return [], f"not looked at: the pairs' tokens are damaged ({wrong[0]}); the next run tokenizes again"
    train = open_stores(store)[0]
    known = [_nats_a_token(train, cache) for cache in _caches(config)]
    best = max(known, key=lambda nats: np.isfinite(nats).sum(), default=np.full(len(train), np.nan))
    n = int(np.isfinite(best).sum())
    if not n:
        return [], NOT_SCORED
    looked_at = f"{n:,} of {len(train):,} pairs, by the reference's log-probs in {config.reference.cache_dir}"
    return list(_apart(train, best)) if n >= LEAST_PAIRS else [], looked_at


def _caches(config: RunConfig) -> Iterator[LogpCache]:
    """The caches of this reference's weights, of whatever dtype and recipe."""
    from dpo_dist.models.digest import folder_digest  # here: it imports torch, and examine.py imports this file

    folder = resolve(config.reference_path, "reference.path", config.run.offline)
    digest = folder_digest(ModelFolder(folder.base) if config.reference.bare_base else folder,
                           digests_folder(config.data))
    for key in described_keys(config.reference.cache_dir):
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


if __name__ == "__main__":
    findings, said = _found(decode(json.load(sys.stdin)), Path(sys.argv[1]))
    print(json.dumps({"findings": [asdict(entry) for entry in findings], "looked_at": said}))
