"""A pack's sequences, the values that belong to them, and several stores as one."""
from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_rows

from dpo_dist.config.compose import compose
from dpo_dist.data.pack import Sequences, pack_pairs, pack_sequences
from dpo_dist.data.packing import filled_in_turn
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore, PairStores
from dpo_dist.types import TokenizedPair

TREES = [Sequences((5, 6), ((7,), (8, 9, 10))), Sequences((11,), ((12, 13),))]


def test_a_packs_sequences_are_its_prompts_with_their_completions_in_order():
    found = [(tuple(p.tolist()), tuple(c.tolist())) for p, c in pack_sequences(TREES).sequences()]
    assert found == [((5, 6), (7,)), ((5, 6), (8, 9, 10)), ((11,), (12, 13))]


def test_values_are_cut_where_the_tokens_of_a_sequence_end():
    batch = pack_sequences(TREES)
    assert [part.tolist() for part in batch.split(torch.arange(6.0))] == [[0], [1, 2, 3], [4, 5]]
    assert [len(part) for part in batch.split(batch.targets)] == batch.lengths.tolist()
    tokens = [token for _, completion in batch.sequences() for token in completion]
    assert torch.cat(batch.split(batch.targets)).tolist() == tokens


def test_a_shared_completion_is_one_sequence():
    pairs = [TokenizedPair((1, 2), (3,), (4, 5), "a"), TokenizedPair((1, 2), (4, 5), (3,), "b")]
    assert len(list(pack_pairs(pairs, [0, 1], [1.0, 1.0]).sequences())) == 2


@pytest.fixture
def stores(tmp_path: Path) -> tuple[PairStore, PairStore, PairStore]:
    def made(n: int, seed: int) -> PairStore:
        write_rows(tmp_path / f"{seed}.jsonl", n, seed=seed)
        return prepare(compose(["model.path=m", f"data.train={tmp_path / f'{seed}.jsonl'}",
                                f"data.cache_dir={tmp_path / 'tokens'}"]).data,
                       None, None)[0]

    one, other = made(5, 0), made(7, 1)
    return one, PairStore.open(one.path.parent / "eval"), other


def test_several_stores_are_one_laid_end_to_end(stores: tuple[PairStore, PairStore, PairStore]):
    together = PairStores(stores)
    wanted = [store.parts(i) for store in stores for i in range(len(store))]
    assert len(together) == len(wanted) == 12
    for i, parts in enumerate(wanted):
        assert all(np.array_equal(a, b) for a, b in zip(together.parts(i), parts, strict=True))
    assert together.at(4) == (stores[0], 4) and together.at(5) == (stores[2], 0), "an empty store holds no pair"
    for parts, wanted_parts in zip(together.all_parts(), wanted, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(parts, wanted_parts, strict=True))
    assert np.array_equal(together.lengths(), [[len(part) for part in parts] for parts in wanted])


@pytest.mark.parametrize("padded", [False, True])
def test_packs_filled_in_turn_keep_to_the_budget_and_never_leave_room_for_the_next(padded: bool):
    r = np.random.default_rng(0)
    sizes, ones = r.integers(1, 60, 200), np.ones(200, np.int64)
    rows, longest = (ones, sizes) if padded else (sizes, ones)

    def size(start: int, end: int) -> int:
        return int(rows[start:end].sum() * longest[start:end].max())

    bounds = filled_in_turn(rows, longest, 50).tolist()
    assert bounds[0] == 0 and bounds[-1] == 200
    for start, end in pairwise(bounds):
        assert size(start, end) <= 50 or end == start + 1
        assert end == 200 or size(start, end + 1) > 50
    assert filled_in_turn(np.empty(0, np.int64), np.empty(0, np.int64), 50).tolist() == [0]
