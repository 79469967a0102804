"""Visits are kept as they were seen, by each rank, and a run that goes on has none of them twice."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_dist.config.compose import compose
from dpo_dist.dynamics.datamap import data_map
from dpo_dist.dynamics.record import VisitLog
from dpo_dist.dynamics.visits import Visits, read_visits, remove_parts, write_part
from dpo_dist.types import PairLogps

CONFIG = compose(["model.path=m", "cluster.device=cpu", "loss.beta=0.5"])
SFT = compose(["model.path=m", "cluster.device=cpu", "loss=sft"])


def visits(*rows: tuple[int, int, float, float]) -> Visits:
    step, pair, chosen, rejected = zip(*rows, strict=True)
    return Visits(np.array(step, np.int32), np.array(pair, np.int32), np.array(chosen, np.float32),
                  np.array(rejected, np.float32))


def rows(of: Visits) -> list[tuple[int, int, float, float]]:
    return list(zip(of.step.tolist(), of.pair.tolist(), of.chosen.tolist(), of.rejected.tolist(), strict=True))


def pack(chosen: list[float], rejected: list[float]) -> PairLogps:
    """A pack's pairs with these log-ratios."""
    policy, zero = torch.tensor([chosen, rejected]), torch.zeros(len(chosen))
    return PairLogps(policy[0], policy[1], zero, zero, zero + 4, zero + 4, zero, 4.0)


def test_what_is_written_by_several_ranks_is_read_in_the_order_of_steps_and_pairs(tmp_path: Path):
    write_part(tmp_path, 1, 2, 1, visits((1, 0, 0.1, 0.2), (2, 5, 0.3, 0.4)))
    write_part(tmp_path, 1, 2, 0, visits((1, 3, 0.5, 0.25), (2, 4, 1.0, -1.0)))
    write_part(tmp_path, 3, 3, 0, visits((3, 0, 2.0, 0.0)))
    found = read_visits(tmp_path)
    assert [row[:2] for row in rows(found)] == [(1, 0), (1, 3), (2, 4), (2, 5), (3, 0)]
    assert found.margin == pytest.approx([-0.1, 0.25, 2.0, -0.1, 2.0])
    assert (found.step.dtype, found.pair.dtype, found.chosen.dtype) == (np.int32, np.int32, np.float32)


def test_a_run_without_parts_has_no_visits(tmp_path: Path):
    assert len(read_visits(tmp_path / "none")) == 0
    remove_parts(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_visit_takes_at_most_16_bytes_on_disk(tmp_path: Path):
    n, random = 100_000, np.random.default_rng(0)
    whole = Visits(np.repeat(np.arange(1, n // 100 + 1, dtype=np.int32), 100),
                   random.permutation(n).astype(np.int32), *random.normal(size=(2, n)).astype(np.float32))
    write_part(tmp_path, 1, n // 100, 0, whole)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 16 * n
    assert len(read_visits(tmp_path)) == n


def test_all_parts_are_removed_with_what_a_killed_writer_left(tmp_path: Path):
    for first, last in ((1, 2), (3, 4)):
        write_part(tmp_path, first, last, 0, visits((first, 0, 0.0, 0.0), (last, 1, 0.0, 0.0)))
    (tmp_path / ".steps-000005-000006-rank-1.parquet.abc.tmp").write_bytes(b"half")
    remove_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_gives_back_the_visits_of_all_ranks_to_any_number_of_ranks(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    logs = [VisitLog(tmp_path / "before", CONFIG.loss, rank, 3, done=0) for rank in range(3)]
    for step in (1, 2):
        for rank, log in enumerate(logs):
            log.see((10 * step + rank,), pack([float(step)], [float(rank)]))
            log.end_step(step)
            log.write(step)
    for log in logs:
        for name, file in log.files().items():
            file.write(checkpoint / name)
    before = rows(read_visits(tmp_path / "before"))
    assert len(before) == 6 and len(list(checkpoint.iterdir())) == 3
    for ranks in (1, 2, 3, 5):
        folder = tmp_path / f"with {ranks}"
        later = [VisitLog(folder, CONFIG.loss, rank, ranks, done=2) for rank in range(ranks)]
        for log in later:
            log.load(checkpoint)
        assert rows(read_visits(folder)) == before
        later[0].see((99,), pack([1.0], [1.0]))
        later[0].end_step(3)
        later[0].write(3)
        assert rows(read_visits(folder)) == [*before, (3, 99, 0.5, 0.5)], "and goes on after them"
        held = [file.tensors["step"] for log in later for file in log.files().values()]
        assert sorted(step for steps in held for step in steps.tolist()) == [1, 1, 1, 2, 2, 2, 3]


def test_a_log_writes_the_rewards_of_each_step_once(tmp_path: Path):
    log = VisitLog(tmp_path, CONFIG.loss, rank=0, ranks=1, done=0)
    log.see((7, 3), pack([1.0, 2.0], [0.0, 4.0]))
    log.see((5,), pack([0.0], [-2.0]))
    log.end_step(1)
    log.write(1)
    log.write(1)                                         # a checkpoint and an evaluation of one step
    log.end_step(2)                                      # a step whose packs are all fillers here
    log.see((3,), pack([6.0], [2.0]))
    log.end_step(3)
    log.write(3)
    assert rows(read_visits(tmp_path)) == [(1, 3, 1.0, 2.0), (1, 5, 0.0, -1.0), (1, 7, 0.5, 0.0), (3, 3, 3.0, 1.0)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["steps-000001-000001-rank-0.parquet",
                                                                "steps-000002-000003-rank-0.parquet"]


def test_a_loss_without_rewards_leaves_no_file(tmp_path: Path):
    log = VisitLog(tmp_path / "visits", SFT.loss, rank=0, ranks=1, done=0)
    log.see((7, 3), pack([1.0, 2.0], [0.0, 4.0]))
    log.end_step(1)
    log.write(1)
    assert not (tmp_path / "visits").exists()


def test_the_data_map_tells_never_learned_from_learned_and_lost():
    seen = visits(*((step, pair, margin, 0.0) for pair, margins in enumerate(
        ([0.0, 1.0, 2.0], [-0.1, -2.0, -1.0], [0.0, 3.0, -1.0], [0.0, 0.5, -4.0])) for step, margin in
        enumerate(margins, start=1)), (4, 5, -3.0, 0.0))
    found = data_map(seen, 6)
    assert found.visits.tolist() == [3, 3, 3, 3, 0, 1]
    assert found.never_learned().tolist() == [1], "one visit, before it was trained on, tells nothing of pair 5"
    assert found.forgotten().tolist() == [3, 2], "those that fell furthest first"
    assert found.of(2) == [0.0, 3.0, -1.0] and found.of(4) == []
    chances = 1 / (1 + np.exp([0.1, 2.0, 1.0]))
    assert found.confidence[1] == pytest.approx(chances.mean()) and np.isnan(found.confidence[4])
    assert found.variability[1] == pytest.approx(chances.std())
    assert (found.first[3], found.last[3], found.correct[3]) == (0.0, -4.0, pytest.approx(1 / 3))
