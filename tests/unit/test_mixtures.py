"""Mixtures of data sets: weights, at most so many rows, at most so many pairs of a prompt; which pairs are taken
depends neither on the order of rows nor on that of files."""
from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_files import read, write_lines
from test_parts import TEMPLATE, assert_same
from test_store import byte_tokenizer, config

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.prepare import prepare
from dpo_dist.data.rows import OVER_CAP
from dpo_dist.data.sampler import Shuffle


def rated(n: int, answers: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of rated answers, every third of them of a prompt that came before: each gives up to 6 pairs."""
    r = random.Random(seed)
    return [{"prompt": f"question {i - i % 3}", "responses": [f"{i} {r.random()}" for _ in range(answers)],
             "ratings": r.sample(range(10), answers)} for i in range(n)]


def taken(tmp_path: Path, lines: list[dict[str, Any]], **data: Any) -> set[tuple[str, str, str]]:
    found, report = read(write_lines(tmp_path / "rows.jsonl", *lines), **data)
    assert report.pairs == len(found)
    return {(str(row.prompt), str(row.chosen), str(row.rejected)) for row in found}               # type: ignore[union-attr]


def test_of_each_prompt_so_many_pairs_are_taken_and_the_others_are_counted(tmp_path: Path):
    rows, report = read(write_lines(tmp_path / "rows.jsonl", *rated(30)), pairs_per_prompt=5)
    assert set(Counter(row.prompt for row in rows).values()) == {5}                               # type: ignore[union-attr]
    assert report.pairs == len(rows) == 50 and report.no_pair == {OVER_CAP: 30 * 6 - 50}
    assert len(read(tmp_path / "rows.jsonl", pairs_per_prompt=18)[0]) == 180


def test_a_larger_number_of_pairs_keeps_those_of_a_smaller_one(tmp_path: Path):
    few, more, all_of_them = (taken(tmp_path, rated(30), pairs_per_prompt=n) for n in (2, 7, 100))
    assert few < more < all_of_them == taken(tmp_path, rated(30))


@pytest.mark.parametrize("limits", [{"pairs_per_prompt": 3}, {"rows": 11}, {"rows": 11, "pairs_per_prompt": 2}])
def test_which_pairs_are_taken_depends_neither_on_the_order_of_rows_nor_on_that_of_files(limits: dict[str, int],
                                                                                        tmp_path: Path):
    rows = rated(30)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert taken(tmp_path, rows, **limits) == taken(tmp_path, shuffled, **limits)
    for order, folder in ((rows, "a"), (shuffled, "b")):
        (tmp_path / folder).mkdir()
        for part in range(3):
            write_lines(tmp_path / folder / f"{part}.jsonl", *order[part::3])
    first, second = ({str(row) for row in _content(tmp_path / folder, limits)} for folder in "ab")
    assert first == second and len(first) > 10


def _content(folder: Path, limits: dict[str, int]) -> list[tuple[Any, ...]]:
    return [(row.prompt, row.chosen, row.rejected) for row in read(folder, **limits)[0]]          # type: ignore[union-attr]


def test_of_repeated_pairs_the_first_are_taken_and_no_more_than_asked_for(tmp_path: Path):
    same = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows, _ = read(write_lines(tmp_path / "rows.jsonl", *[same] * 5), pairs_per_prompt=2)
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["1", "2"]


def test_several_processes_take_the_same_pairs_and_kept_ties_count_among_them(tmp_path: Path):
    rows = [{**item, "ratings": [1, 1, *item["ratings"][2:]]} for item in rated(40)]
    data = DatasetConfig(str(write_lines(tmp_path / "rows.jsonl", *rows)), pairs_per_prompt=4, rows=31)
    settings = config(tmp_path, data, ties="keep")
    assert_same(settings, tmp_path, byte_tokenizer(TEMPLATE))
    store = prepare(settings, byte_tokenizer(TEMPLATE), "tokenizer")[0]
    read_report = store.report["sources"][0]["read"]
    assert max(Counter(store.content[:, 0].tolist()).values()) == 4
    assert read_report["kept_ties"] == int((store.tie > 0).sum()) > 0 and read_report["pairs"] == len(store)


def test_an_epoch_of_a_mixture_is_the_same_whenever_it_is_made_and_has_every_source_by_its_weight():
    sources = np.repeat(np.arange(3), [60, 40, 30]).astype(np.uint16)
    epochs = [Shuffle(7, "digest", sources, (1.0, 2.5, 0.1)).epoch(1) for _ in range(2)]
    assert np.array_equal(*epochs)
    assert np.bincount(sources[epochs[0]]).tolist() == [60, 100, 3]
    assert (np.bincount(epochs[0][sources[epochs[0]] == 1])[60:100] >= 2).all()


def test_the_cap_is_a_number_above_zero_and_part_of_a_runs_identity():
    def run(cap: str) -> Any:
        return compose(["model.path=m", "data.train=[{path: a.jsonl" + cap + "}]"])

    with pytest.raises(UserError, match=r"pairs_per_prompt=0 must be greater than 0"):
        run(", pairs_per_prompt: 0")
    assert run(", pairs_per_prompt: 2").identity() != run("").identity()
    assert "pairs_per_prompt" not in json.dumps(run("").identity_dict())
