"""The reference cache: found by content, never half-read, never believed when damaged."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_llama

from dpo_dist.config.compose import compose
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey, ShardWriter, sequence_key
from dpo_dist.reference.make import Setup, reference_key
from dpo_dist.runtime.world import World

KEY = ReferenceKey("weights", "float32")


def filled(folder: Path, entries: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]],
           key: ReferenceKey = KEY) -> LogpCache:
    cache = LogpCache(str(folder), key)
    writer = ShardWriter(cache)
    for (prompt, completion), values in entries.items():
        writer.add(sequence_key(prompt, completion), np.array(values))
    writer.flush()
    return reopened(folder, key)


def reopened(folder: Path, key: ReferenceKey = KEY) -> LogpCache:
    cache = LogpCache(str(folder), key)
    cache.open_shards(cache.verified_shards()[0])
    return cache


def test_what_was_written_is_read_back_by_its_tokens(tmp_path: Path):
    cache = filled(tmp_path, {((1, 2), (3, 4)): [-1.0, -2.0], ((1, 2), (5,)): [-0.5]})
    assert cache.logps((1, 2), (3, 4)).tolist() == [-1.0, -2.0]
    assert cache.logps(np.array([1, 2]), np.array([5])).tolist() == [-0.5]


def test_one_changed_token_is_a_miss_and_so_is_a_moved_boundary(tmp_path: Path):
    cache = filled(tmp_path, {((1, 2), (3, 4)): [-1.0, -2.0]})
    others = (((1, 2), (3, 5)), ((1, 9), (3, 4)), ((1,), (2, 3, 4)), ((1, 2, 3), (4,)), ((1, 2, 0), (3, 4)),
              ((1, 2), (3, 4, 0)))
    for prompt, completion in others:
        assert sequence_key(prompt, completion) not in cache
        with pytest.raises(KeyError):
            cache.logps(prompt, completion)


def test_other_weights_or_another_dtype_never_share_an_entry(tmp_path: Path):
    filled(tmp_path, {((1,), (2,)): [-1.0]})
    assert len(reopened(tmp_path, ReferenceKey("other", "float32"))) == 0
    assert len(reopened(tmp_path, ReferenceKey("weights", "bfloat16"))) == 0
    assert len(reopened(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_set_aside_and_its_sequences_are_missing(tmp_path: Path, damage: str):
    cache = filled(tmp_path, {((1,), (2,)): [-1.0]})
    (shard,) = cache.folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes({"flip": bytes(content), "truncate": shard.read_bytes()[:-3], "empty": b""}[damage])
    names, damaged = cache.verified_shards()
    assert (names, damaged) == ([], 1)
    assert len(list(cache.folder.glob("*.corrupt"))) == 1


def test_two_writers_at_once_lose_nothing(tmp_path: Path):
    cache = LogpCache(str(tmp_path), KEY)
    writers = [ShardWriter(cache), ShardWriter(cache)]
    for i, writer in enumerate(writers):
        writer.add(sequence_key((i,), (7, 8)), np.array([-1.0 * i, -2.0]))
    for writer in writers:
        writer.flush()
    both = reopened(tmp_path)
    assert [both.logps((i,), (7, 8)).tolist() for i in (0, 1)] == [[0.0, -2.0], [-1.0, -2.0]]


def test_what_a_killed_writer_left_half_written_is_not_read(tmp_path: Path):
    cache = filled(tmp_path, {((1,), (2,)): [-1.0]})
    (cache.folder / ".abc.safetensors.123.tmp").write_bytes(b"half")
    assert len(reopened(tmp_path)) == 1


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path):
    with pytest.raises(FloatingPointError, match="not finite"):
        ShardWriter(LogpCache(str(tmp_path), KEY)).add(sequence_key((1,), (2,)), np.array([float("nan")]))


def test_many_shards_and_thousands_of_entries_are_found(tmp_path: Path):
    cache = LogpCache(str(tmp_path), KEY)
    for s in range(5):
        writer = ShardWriter(cache)
        for i in range(1000):
            writer.add(sequence_key((s,), (i,)), np.array([-float(i)]))
        writer.flush()
    opened = reopened(tmp_path)
    assert len(opened) == 5000
    assert all(opened.logps((s,), (i,))[0] == -i for s in range(5) for i in range(0, 1000, 97))


def test_values_of_fused_kernels_in_bf16_have_a_key_of_their_own_and_exact_ones_share_it(tmp_path: Path):
    folder, world = write_tiny_llama(tmp_path / "m"), World(0, 1, 0, torch.device("cpu"))

    def key(dtype: torch.dtype, fused: bool, *more: str) -> ReferenceKey:
        config = compose([f"model.path={folder}", "cluster.device=cpu", *more])
        setup = Setup(ModelFolder(folder), dtype, "branch", world, fused=fused)
        return reference_key(config.reference, "weights", setup, quantized=None)

    assert key(torch.bfloat16, True) != key(torch.bfloat16, False) and "fused kernels" in key(torch.bfloat16,
                                                                                              True).recipe
    assert key(torch.float32, True) == key(torch.float32, False)
    assert (key(torch.bfloat16, True, "reference.offload=disk")
            == key(torch.bfloat16, False)), "read from disk, the model's own code computes"
