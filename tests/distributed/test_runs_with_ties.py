"""A run whose data has ties: they are trained on by a loss that knows them, on any number of ranks, and what is said of
chosen and rejected answers leaves them out."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, metrics, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

TIES = 5                                     # of 24 pairs


def write_judged(path: Path, seed: int = 0) -> Path:
    """Rows of which the first five say that neither answer is better, two of them that both are bad."""
    rows = write_rows(path, 24, seed=seed)
    said = [{"tie": True}] * 3 + [{"both_bad": True}] * 2 + [{"confidence": 0.5, "locale": "fr"}] * 4
    said += [{}] * (len(rows) - len(said))
    path.write_text("".join(json.dumps({**row, **more}) + "\n" for row, more in zip(rows, said, strict=True)))
    return path


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(write_judged(tmp_path / "rows.jsonl")),
            eval_on(write_judged(tmp_path / "held_out.jsonl", seed=1)), "train.pairs_per_step=24", "train.max_steps=3",
            "optim.lr=3e-3", "optim.schedule=constant", "optim.warmup_ratio=0", "loss.beta=0.5"]


@pytest.mark.parametrize("loss", ["rao_kupper", "davidson"])
def test_ties_are_trained_on_alike_on_one_and_two_ranks(loss: str, words: list[str], tmp_path: Path):
    rows = []
    for ranks, zero in ((1, "none"), (2, "zero3")):
        run = tmp_path / f"{ranks}"
        dpo_dist(*words, f"loss={loss}", "data.ties=keep", f"zero={zero}", f"run.dir={run}",
                 f"cluster.procs_per_node={ranks}", "train.tokens_per_microbatch=200")
        rows.append((metrics(run), metrics(run, "eval")))
        assert "5 ties (2 both bad) kept" in (run / "data.txt").read_text()
        ranked = [json.loads(line)["pair"] for line in (run / "suspects.jsonl").read_text().splitlines()]
        assert sorted(ranked) == list(range(TIES, 24)), "a tie has no label that could be flipped"
    (train, held_out), (train_2, held_out_2) = rows
    # where policy and reference agree half of the judgments are ties, and either wins a quarter; four pairs count half
    weight = 24 - 4 * 0.5
    assert train[0]["loss"] == pytest.approx((TIES * math.log(2) + (weight - TIES) * math.log(4)) / weight, rel=1e-6)
    assert train[-1]["loss"] < train[0]["loss"] - 0.01 and train[-1]["rewards/margins"] > 0.05
    for mine, other in ((train, train_2), (held_out, held_out_2)):
        for one, two in zip(mine, other, strict=True):
            for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
                assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name


def test_ties_that_are_dropped_leave_the_same_run_as_rows_without_them(words: list[str], tmp_path: Path):
    dpo_dist(*words, "zero=none", f"run.dir={tmp_path / 'dropped'}")
    for name in ("rows.jsonl", "held_out.jsonl"):
        file = tmp_path / name
        file.write_text("".join(file.read_text().splitlines(keepends=True)[TIES:]))
    dpo_dist(*words, "zero=none", f"run.dir={tmp_path / 'without'}")
    found, wanted = (metrics(tmp_path / name) for name in ("dropped", "without"))
    for one, two in zip(found, wanted, strict=True):
        assert one["loss"] == two["loss"] and one["rewards/margins"] == two["rewards/margins"]
    assert "5 ties (2 both bad) left out" in (tmp_path / "dropped" / "data.txt").read_text()


def test_held_out_pairs_that_are_all_ties_are_refused(words: list[str], tmp_path: Path):
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:TIES]))
    said = dpo_dist(*words, "loss=davidson", "data.ties=keep", "zero=none", f"run.dir={tmp_path / 'run'}", code=2)
    assert "all 5 pairs are ties" in said.stdout + said.stderr
