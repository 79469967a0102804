"""Checkpoints as files: what they hold, which of them stay, and what a fault costs."""
from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dpo_dist.run.checkpoint import DAMAGED, Keep, TrainState, read_state
from dpo_dist.run.saver import Saver
from dpo_dist.runtime.checksums import checksum, damage
from dpo_dist.runtime.host_memory import available_bytes
from dpo_dist.runtime.run_dir import COMPLETE, RunDir
from dpo_dist.runtime.tensor_file import TensorFile
from dpo_dist.runtime.world import World

HOUR = 3600.0


class Part:
    """A part of a run whose weight counts the steps."""

    def __init__(self) -> None:
        self.weight = torch.zeros(3)

    def files(self) -> dict[str, TensorFile]:
        return {"weights.safetensors": TensorFile({"w": self.weight})}

    def load(self, folder: Path) -> None:
        self.weight = safetensors.torch.load_file(folder / "weights.safetensors")["w"]


def state(step: int, saved_at: float = 0.0) -> TrainState:
    return TrainState(step, None, 1, [], "", {}, saved_at)


def saver(folder: Path, world: World, said: list[str], keep: Keep | None = None, in_background: bool = True) -> Saver:
    return Saver(RunDir(folder), keep or Keep(2), in_background, world, said.append)


def test_a_tensor_file_is_what_safetensors_reads_and_its_checksum_is_that_of_the_file(tmp_path: Path):
    tensors = {"half": torch.randn(5, 3).bfloat16(), "wide": torch.randn(7, dtype=torch.float64),
               "none": torch.empty(0), "number": torch.tensor(3.0), "bytes": torch.arange(9, dtype=torch.uint8),
               "part": torch.randn(4, 6)[:, 2:5]}
    file = TensorFile(tensors, {"format": "pt"})
    told = file.write(tmp_path / "f.safetensors")
    assert told == checksum(tmp_path / "f.safetensors")
    read = safetensors.torch.load_file(tmp_path / "f.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safetensors.safe_open(tmp_path / "f.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_checkpoint_holds_the_weights_of_its_step_though_training_goes_on(tmp_path: Path, world: World):
    part, said = Part(), list[str]()
    with saver(tmp_path, world, said) as writing:
        writing.save([part], state(1))
        part.weight += 1                                     # in place, as an optimizer does
    folder = RunDir(tmp_path).checkpoint(1)
    assert not damage(folder, COMPLETE) and not said
    other = Part()
    other.weight += 5
    other.load(folder)
    assert torch.equal(other.weight, torch.zeros(3)) and read_state(folder) == state(1)


def test_copies_are_written_over_at_the_next_save_where_shapes_are_the_same():
    weight, grows = torch.randn(4, 6)[:, 2:5], torch.zeros(2)
    first = TensorFile({"same": weight, "grows": grows}).copied()
    known = {name: tensor.clone() for name, tensor in first.tensors.items()}
    weight += 1
    assert torch.equal(first.tensors["same"], known["same"]), "a copy does not follow the weight"
    second = TensorFile({"same": weight, "grows": torch.zeros(3), "new": torch.ones(1)}).copied(into=first)
    assert second.tensors["same"] is first.tensors["same"] and torch.equal(second.tensors["same"], weight)
    assert {name: tensor.numel() for name, tensor in second.tensors.items()} == {"same": 12, "grows": 3, "new": 1}


def test_rows_of_later_steps_are_not_in_a_checkpoint(tmp_path: Path, world: World):
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text('{"step": 1}\n')
    writing = saver(tmp_path, world, [])
    writing.save([Part()], state(1))
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 2}\n')
    writing.wait()
    assert (run_dir.checkpoint(1) / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_fails_is_told_and_the_checkpoints_before_stay(tmp_path: Path, world: World, in_background: bool):
    run_dir, said = RunDir(tmp_path), list[str]()
    writing = saver(tmp_path, world, said, Keep(1), in_background)
    writing.save([Part()], state(1))
    writing.wait()
    run_dir.checkpoint(2).parent.mkdir(exist_ok=True)
    run_dir.checkpoint(2).write_text("a file in the way")
    writing.save([Part()], state(2))
    assert writing.wait() is None
    assert "step 2 is not saved: " in said[0] and "step-000001 stays the last checkpoint" in said[0]
    run_dir.checkpoint(2).unlink()
    writing.save([Part()], state(3))
    writing.wait()
    assert [folder.name for folder in run_dir.checkpoints()] == ["step-000003"]


def test_what_a_cut_off_save_left_goes_once_there_is_a_newer_checkpoint(tmp_path: Path, world: World):
    run_dir = RunDir(tmp_path)
    for step, name in ((1, "half"), (3, DAMAGED)):
        run_dir.checkpoint(step).mkdir(parents=True)
        (run_dir.checkpoint(step) / name).touch()
    writing = saver(tmp_path, world, [])
    for step in (2, 4):
        writing.save([Part()], state(step))
        writing.wait()
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_what_a_person_put_beside_checkpoints_is_none_and_stays_and_a_millionth_step_is_the_newest(tmp_path: Path,
                                                                                                   world: World):
    run_dir = RunDir(tmp_path)
    for name in ("step-000004.bak", "step-000004 (copy)", "step-9", "notes", "step-999999", "step-1000000"):
        (run_dir.path / "checkpoints" / name).mkdir(parents=True)
        (run_dir.path / "checkpoints" / name / COMPLETE).touch()
    assert [folder.name for folder in run_dir.checkpoints()] == ["step-999999", "step-1000000"]
    with saver(tmp_path, world, [], Keep(1)) as writing:
        writing.save([Part()], state(1_000_001))
    assert sorted(folder.name for folder in (run_dir.path / "checkpoints").iterdir()) == [
        "notes", "step-000004 (copy)", "step-000004.bak", "step-1000001", "step-9"]


def test_one_checkpoint_of_each_stretch_of_hours_stays_also_where_the_clock_jumps(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    times = {1: 0.0, 2: 0.6, 3: 1.2, 4: 1.8, 5: 2.5, 6: 0.1, 7: 0.2, 8: 5.0, 9: 5.1}
    for step, hours in times.items():
        run_dir.checkpoint(step).mkdir(parents=True)
        (run_dir.checkpoint(step) / "state.json").write_text(json.dumps(asdict(state(step, HOUR * hours))))
        (run_dir.checkpoint(step) / COMPLETE).touch()
    (run_dir.checkpoint(7) / "state.json").write_text("{damaged")
    stay = {int(folder.name[-6:]) for folder in set(run_dir.checkpoints()) - set(Keep(1, None, 1).superfluous(run_dir))}
    assert stay == {1, 3, 5, 6, 8, 9}
    assert Keep(9).superfluous(run_dir) == [] and len(Keep(1).superfluous(run_dir)) == 8
    assert run_dir.checkpoint(9) not in Keep(1).superfluous(run_dir, more=1), "the newest stays until there is another"


def test_the_machines_memory_is_known():
    assert 2**28 < available_bytes() < 2**50
