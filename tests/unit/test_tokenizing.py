"""How many processes tokenize, and on which ranks."""
from __future__ import annotations

import os
from pathlib import Path

from dpo_dist.run.tokenizing import cores_of_ranks, parts_of_ranks
from dpo_dist.runtime.cores import usable_cores


def test_parts_go_to_the_ranks_in_turn_and_never_more_than_they_have_cores():
    assert parts_of_ranks([2, 2], 4) == [[0, 2], [1, 3]]
    assert parts_of_ranks([1, 3], 9) == [[0], [1, 2, 3]]
    assert parts_of_ranks([4, 4, 4], 2) == [[0], [1], []]
    assert parts_of_ranks([3, 0], 9) == [[0, 1, 2], []]
    assert parts_of_ranks([1], 2) == [[0]]


def test_ranks_of_a_machine_share_its_cores_whether_bound_to_their_own_or_not():
    all_of_it, first, second = frozenset(range(8)), frozenset(range(4)), frozenset(range(4, 8))
    assert cores_of_ranks([(0, all_of_it), (0, all_of_it)]) == [4, 4]
    assert cores_of_ranks([(0, first), (0, second), (1, all_of_it)]) == [4, 4, 8]
    assert cores_of_ranks([(0, frozenset([0]))] * 3) == [1, 1, 1]


def test_a_containers_share_of_time_limits_the_cores(tmp_path: Path):
    own = frozenset(os.sched_getaffinity(0))
    assert usable_cores(tmp_path / "none") == own
    for content, wanted in (("max 100000", len(own)), ("100000 100000", 1), ("50000 100000", 1),
                            ("99900000 100000", len(own))):
        (tmp_path / "cpu.max").write_text(content)
        found = usable_cores(tmp_path / "cpu.max")
        assert found <= own and len(found) == wanted
