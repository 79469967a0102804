"""Which checkpoint is the best, told from metrics.jsonl and the checkpoints that are whole."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dpo_dist.run.checkpoint import Keep, TrainState
from dpo_dist.run.save_timer import SaveTimer
from dpo_dist.run.saver import Saver
from dpo_dist.runtime.best import best_evaluation, exported_step, is_best_yet
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.runtime.world import World


def run_dir(folder: Path, rows: dict[int, object], whole: list[int], metric: str = "loss") -> RunDir:
    found = RunDir(folder)
    found.metrics.write_text("".join(json.dumps({"step": step, "split": "eval", metric: value}) + "\n"
                                     for step, value in rows.items()))
    for step in whole:
        found.checkpoint(step).mkdir(parents=True)
        (found.checkpoint(step) / "COMPLETE").touch()
    return found


@pytest.mark.parametrize("metric, best", [("loss", 4), ("rewards/accuracies", 2), ("rewards/margins", 2)])
def test_the_loss_should_be_low_and_rewards_high_and_of_equals_the_earlier_is_best(tmp_path: Path, metric: str,
                                                                                   best: int):
    rows = {0: 0.0, 2: 0.7, 4: 0.3, 6: 0.3, 8: 0.7, 10: "nan"}
    found = run_dir(tmp_path, rows, [2, 4, 6, 8, 10], metric)
    assert exported_step(found, metric, 10) == (best, {metric: rows[best]})
    assert is_best_yet(found, metric, 12, float("nan")) is False
    assert is_best_yet(found, metric, 12, float(rows[best])) is False, "a tie is no improvement"
    assert is_best_yet(found, metric, 12, 0.0 if metric == "loss" else 1.0)
    assert is_best_yet(found, metric, best, float(rows[best])), "it is the best itself"


def test_what_is_not_whole_and_weights_from_before_training_are_not_the_best(tmp_path: Path):
    found = run_dir(tmp_path, {0: 0.1, 2: 0.2, 4: 0.5}, [4])
    found.checkpoint(2).mkdir()
    assert best_evaluation(found, "loss") == {"step": 4, "split": "eval", "loss": 0.5}
    assert exported_step(found, None, 4) == (4, {"loss": 0.5})
    (found.checkpoint(4) / "COMPLETE").unlink()
    assert best_evaluation(found, "loss") is None and exported_step(found, "loss", 6) == (6, {})


class Part:
    def files(self) -> dict[str, TensorFile]:
        return {"weights.safetensors": TensorFile({"w": torch.ones(1)})}

    def load(self, folder: Path) -> None:
        raise AssertionError("nothing is loaded here")


def test_an_older_checkpoint_goes_once_it_is_neither_new_nor_best(tmp_path: Path, world: World):
    losses = {2: 0.5, 4: 0.6, 6: 0.4, 8: 0.4, 10: 0.9}
    found, seen = RunDir(tmp_path), []
    saver = Saver(found, Keep(1, "loss"), True, world, print)
    for step, loss in losses.items():
        with found.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "split": "eval", "loss": loss}) + "\n")
        for _ in range(2):                                   # a second time where it is there, as after an evaluation
            saver.save([Part()], TrainState(step, None, 1, [], "", {}, 0.0))
            saver.wait()
        seen.append([int(folder.name[-6:]) for folder in found.checkpoints()])
    assert seen == [[2], [2, 4], [6], [6, 8], [6, 10]]


def test_it_is_time_to_save_so_many_minutes_after_the_last_save():
    clock = iter([100.0, 219.0, 220.0, 500.0, 500.0, 619.0, 620.0])
    timer = SaveTimer(2, lambda: next(clock))
    assert [bool(timer.asks()) for _ in range(3)] == [False, True, True]
    timer.restart()
    assert [timer.asks() for _ in range(2)] == [0, 0.5], "less than any signal's number"
    assert not SaveTimer(None, lambda: 0.0).asks()
