"""Reference log-probs on disk, found by content: what was scored once is never scored again, by any run.

    <cache_dir>/<key>/key.json                       what the values are: weights digest, dtype, numeric recipe
    <cache_dir>/<key>/<digest>.safetensors           a shard: keys (n, 16) uint8, offsets (n+1,) int64, logps float32

A shard is named by the digest of its own bytes, written under a temporary name and renamed: several writers never
collide, a killed one leaves at worst a temporary file, and a damaged shard does not match its name.
"""
from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.files import write_atomic, write_json
from dpo_dist.runtime.json_files import found_object

if TYPE_CHECKING:
    from dpo_dist.runtime.world import World

# a kill loses at most this share of the scoring time (and at least FLUSH_SECONDS) ...
FLUSH_SHARE = 0.05
FLUSH_SECONDS = 1.0                # ... while the number of shards grows only with the logarithm of the time

PLAIN_RECIPE = "torch, softmax in fp32, v1"


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that decides a reference log-prob besides the tokens."""

    weights: str                   # digest of the model's bytes, from its files
    dtype: str                     # fp32 or bf16
    recipe: str = PLAIN_RECIPE

    @property
    def folder(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=12).hexdigest()


def described_keys(cache_dir: str) -> list[ReferenceKey]:
    """What the folders of a cache say that they hold; a damaged one says nothing until its reference is used again."""
    described = {file.parent.name: found_object(file) or {} for file in sorted(Path(cache_dir).glob("*/key.json"))}
    names = {field.name for field in fields(ReferenceKey)}
    keys = {folder: ReferenceKey(**says) for folder, says in described.items() if says.keys() == names}
    return [key for folder, key in keys.items() if key.folder == folder]


def sequence_key(prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> bytes:
    """16 bytes that name a (prompt, completion): nothing stripped, the boundary included."""
    prompt, completion = np.asarray(prompt_ids, dtype="<i4"), np.asarray(completion_ids, dtype="<i4")
    return hashlib.blake2b(len(prompt).to_bytes(8, "little") + prompt.tobytes() + completion.tobytes(),
                           digest_size=16).digest()


class LogpCache:
    """The shards of one ReferenceKey. Reading sees the shards that `open_shards` was given; writing adds new ones."""

    def __init__(self, cache_dir: str, key: ReferenceKey):
        self.folder = Path(cache_dir) / key.folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"reference.cache_dir={cache_dir} cannot be made: {error}; set a folder that can be "
                            "written") from error
        described = self.folder / "key.json"
        if found_object(described) != asdict(key):           # not there, or damaged
            write_json(described, asdict(key))
        self.open_shards(())

    def verified_shards(self, known: Collection[str] = ()) -> tuple[list[str], int]:
        """(names of whole shards, number of damaged ones), without `known` ones. Damaged shards are set aside, so their
        sequences count as missing."""
        whole, damaged = [], 0
        for path in sorted(path for path in self.folder.glob("*.safetensors") if path.name not in known):
            try:
                if hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() == path.stem:
                    whole.append(path.name)
                    continue
                path.rename(path.with_suffix(".corrupt"))
            except FileNotFoundError:                    # another job found it damaged too
                pass
            damaged += 1
        return whole, damaged

    def open_shards(self, names: Sequence[str]) -> None:
        """Makes exactly these shards readable. All ranks open the list that one rank verified, so they agree on what is
        missing."""
        self._shards: dict[str, safetensors.safe_open] = {}
        self._high, self._low = np.empty(0, "<u8"), np.empty(0, "<u8")
        self._where = np.empty((0, 3), np.int64)              # shard, start, end
        self.add_shards(names)

    def add_new_shards(self, world: World) -> bool:
        """Makes new shards readable; whether there were any. All ranks call it, and open what rank 0 verified."""
        names, _ = world.on_main(lambda: self.verified_shards(self._shards))
        self.add_shards(names)
        return bool(names)

    def add_shards(self, names: Sequence[str]) -> None:
        """Makes these shards readable beside those that are."""
        keys, where = [np.stack([self._high, self._low], 1)], [self._where]
        for i, name in enumerate(names, start=len(self._shards)):
            shard = self._shards[name] = safetensors.safe_open(self.folder / name, framework="np")
            offsets = shard.get_tensor("offsets")
            keys.append(np.ascontiguousarray(shard.get_tensor("keys")).view("<u8").reshape(-1, 2))
            where.append(np.stack([np.full(len(offsets) - 1, i), offsets[:-1], offsets[1:]], 1))
        self._opened = list(self._shards.values())
        both = np.concatenate(keys)
        order = np.lexsort((both[:, 1], both[:, 0]))
        self._high, self._low, self._where = both[order, 0], both[order, 1], np.concatenate(where)[order]

    def __len__(self) -> int:
        return len(self._high)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """(n,) bool: which of these keys, (n, 2) uint64, are there."""
        if not len(self):
            return np.zeros(len(keys), dtype=bool)
        at = np.minimum(np.searchsorted(self._high, keys[:, 0]), len(self) - 1)
        found = (self._high[at] == keys[:, 0]) & (self._low[at] == keys[:, 1])
        # another key with the same first half was found
        for i in np.flatnonzero((self._high[at] == keys[:, 0]) & ~found):
            found[i] = keys[i].tobytes() in self
        return found

    def logps(self, prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(C,) float32 log-probs of the completion's tokens, nats. KeyError where they were never scored."""
        at = self._find(sequence_key(prompt_ids, completion_ids))
        if at is None:
            raise KeyError(f"no reference log-probs in {self.folder} for a completion of {len(completion_ids)} tokens")
        shard, start, end = self._where[at]
        values = self._opened[shard].get_slice("logps")[int(start):int(end)]
        if len(values) != len(completion_ids):
            raise KeyError(f"{self.folder}: an entry has {len(values)} log-probs for {len(completion_ids)} tokens")
        return values

    def _find(self, key: bytes) -> int | None:
        high, low = np.frombuffer(key, "<u8")
        at = int(np.searchsorted(self._high, high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low:
                return at
            at += 1
        return None


class ShardWriter:
    """Collects scored sequences and writes them as shards: often enough that a kill costs little, and that a reader
    waits at most `at_most_seconds`."""

    def __init__(self, cache: LogpCache, at_most_seconds: float = math.inf):
        self._folder, self._at_most = cache.folder, at_most_seconds
        self._keys: list[bytes] = []
        self._logps: list[np.ndarray] = []
        self._began = self._flushed = time.monotonic()

    def add(self, key: bytes, logps: np.ndarray) -> None:
        if not np.isfinite(logps).all():
            raise FloatingPointError("the reference model gave a log-prob that is not finite; its values cannot be "
                                     "used")
        self._keys.append(key)
        self._logps.append(np.asarray(logps, dtype=np.float32))

    def flush_if_due(self) -> None:
        now = time.monotonic()
        if now - self._flushed >= max(FLUSH_SECONDS, min(FLUSH_SHARE * (now - self._began), self._at_most)):
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._keys:
            return
        shard = safetensors.numpy.save({
            "keys": np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 16),
            "offsets": np.cumsum([0, *map(len, self._logps)], dtype=np.int64),
            "logps": np.concatenate(self._logps)})
        write_atomic(self._folder / f"{hashlib.blake2b(shard, digest_size=16).hexdigest()}.safetensors", shard)
        self._keys, self._logps = [], []
