"""How pairs are laid out in a pack: what is shared is there once, and every token knows who predicts it."""
from __future__ import annotations

import torch

from dpo_dist.data.pack import Sequences, pack_pairs, pack_sequences
from dpo_dist.types import TokenizedPair


def test_a_pack_computes_a_shared_prompt_and_a_shared_completion_once():
    pairs = [TokenizedPair((5, 6), (7, 1), (8, 9, 1), "a"), TokenizedPair((5, 6), (8, 9, 1), (4, 1), "b"),
             TokenizedPair((3,), (7, 1), (2, 1), "c")]
    batch = pack_pairs(pairs, [0, 1, 2], [1.0, 1.0, 1.0])
    assert batch.input_ids[0].tolist() == [5, 6, 7, 1, 8, 9, 1, 4, 1, 3, 7, 1, 2, 1]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2]
    assert batch.chosen.tolist() == [0, 1, 3]
    assert batch.rejected.tolist() == [1, 2, 4]
    assert batch.lengths.tolist() == [2, 3, 2, 2, 2]


def test_a_completions_first_token_is_predicted_by_the_prompts_last_and_the_rest_by_their_own_predecessors():
    batch = pack_sequences([Sequences((5, 6), ((7, 8, 1), (9, 1)))])
    ids = batch.input_ids[0]
    assert ids[batch.predict_at].tolist() == [6, 7, 8, 6, 9]
    assert batch.targets.tolist() == [7, 8, 1, 9, 1]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1]
    assert batch.offset.tolist() == [0, 1, 2, 0, 1]


def test_only_counted_tokens_are_asked_for_and_keep_their_place_in_the_completion():
    pairs = [TokenizedPair((5, 6), (7, 8, 9, 1), (3, 1), "a", chosen_counts=(True, False, False, True),
                           rejected_counts=(False, True)), TokenizedPair((5, 6), (4, 1), (3, 1), "b")]
    batch = pack_pairs(pairs, [0, 1], [1.0, 1.0])
    ids = batch.input_ids[0]
    assert ids.tolist() == [5, 6, 7, 8, 9, 1, 3, 1, 4, 1, 3, 1], "the others are computed"
    assert ids[batch.predict_at].tolist() == [6, 9, 3, 6, 4, 6, 3]
    assert batch.targets.tolist() == [7, 1, 1, 4, 1, 3, 1]
    assert batch.sequence.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert batch.offset.tolist() == [0, 3, 1, 0, 1, 0, 1]
    assert batch.lengths.tolist() == [2, 1, 2, 2]
    assert batch.counted(torch.arange(10)).tolist() == [0, 3, 5, 6, 7, 8, 9]


def test_a_completion_is_shared_only_where_the_same_tokens_of_it_are_counted():
    def pair(*counts: bool) -> TokenizedPair:
        return TokenizedPair((5,), (7, 8, 1), (9, 1), "a", chosen_counts=counts or None)

    pairs = [pair(), pair(True, True, True), pair(False, True, True), pair(True, False, True), pair(False, True, True)]
    batch = pack_pairs(pairs, range(5), [1.0] * 5)
    assert batch.chosen.tolist() == [0, 0, 2, 3, 2] and batch.rejected.tolist() == [1] * 5
