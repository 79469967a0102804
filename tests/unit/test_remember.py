"""A digest is remembered for a file that stays as it is, and never believed for another content."""
from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_llama
from safetensors.torch import load_file, save_file

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.locate import content_digest
from dpo_dist.models.digest import model_digest
from dpo_dist.runtime import remember
from dpo_dist.runtime.remember import remembered

OLD = 1_600_000_000                              # a time stamp of 2020


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns once what was written before counts as settled, which takes 0.1 s here."""
    monkeypatch.setattr(remember, "SETTLED_SECONDS", 0.1)
    return lambda: time.sleep(0.15)


def counted(reads: list[Path]) -> Callable[[Path], str]:
    def compute(file: Path) -> str:
        reads.append(file)
        return file.read_text()
    return compute


def test_a_file_that_stays_as_it_is_is_read_once(tmp_path, settled):
    file, reads = tmp_path / "file", []
    file.write_text("content")
    settled()
    assert [remembered(tmp_path / "memory", "text", file, counted(reads)) for _ in range(3)] == ["content"] * 3
    assert reads == [file]
    assert remembered(tmp_path / "memory", "another thing", file, lambda _: 5) == 5
    assert remembered(None, "text", file, counted(reads)) == "content" and len(reads) == 2


def test_what_is_known_of_a_link_is_that_of_the_file_it_leads_to(tmp_path, settled):
    (tmp_path / "one").write_text("one")
    (tmp_path / "two").write_text("two")
    link = tmp_path / "link"
    link.symlink_to("one")
    settled()
    assert remembered(tmp_path / "memory", "text", link, Path.read_text) == "one"
    link.unlink()
    link.symlink_to("two")
    assert remembered(tmp_path / "memory", "text", link, Path.read_text) == "two"


@pytest.mark.parametrize("change", ["written in place", "replaced", "replaced by an older file", "touched",
                                    "written with the old time stamp"])
def test_a_file_that_changed_is_read_again(change: str, tmp_path, settled):
    file, other, reads = tmp_path / "file", tmp_path / "other", []
    file.write_text("before")
    other.write_text("after!")                   # as long
    os.utime(other, (OLD - 10, OLD - 10))
    os.utime(file, (OLD, OLD))
    settled()
    assert remembered(tmp_path / "memory", "text", file, counted(reads)) == "before"
    if change == "written in place":
        with file.open("r+") as stream:
            stream.write("after!")
    elif change == "replaced":
        shutil.copyfile(other, tmp_path / "copy")
        (tmp_path / "copy").rename(file)
    elif change == "replaced by an older file":
        other.rename(file)
    elif change == "touched":
        file.touch()
    else:
        file.write_text("after!")
        os.utime(file, (OLD, OLD))
    wanted = "before" if change == "touched" else "after!"
    assert remembered(tmp_path / "memory", "text", file, counted(reads)) == wanted and len(reads) == 2


def test_nothing_is_remembered_of_a_file_that_has_only_just_changed(tmp_path):
    file, reads = tmp_path / "file", []
    file.write_text("content")
    os.utime(file, (OLD, OLD))                   # its time of change is now, all the same
    for _ in range(2):
        remembered(tmp_path / "memory", "text", file, counted(reads))
    assert len(reads) == 2 and not (tmp_path / "memory").exists()


def test_nothing_is_remembered_of_a_file_that_changes_while_it_is_read(tmp_path, settled):
    file = tmp_path / "file"
    file.write_text("before")
    settled()

    def compute(file: Path) -> str:
        text = file.read_text()
        file.write_text("after!")
        return text

    assert remembered(tmp_path / "memory", "text", file, compute) == "before"
    assert remembered(tmp_path / "memory", "text", file, Path.read_text) == "after!"


def test_a_damaged_note_and_a_folder_that_cannot_be_written_only_cost_time(tmp_path, settled):
    file = tmp_path / "file"
    file.write_text("content")
    settled()
    for content in ("", "[]", "{}", '{"state": 5'):
        for note in (tmp_path / "memory").glob("*"):
            note.write_text(content)
        assert remembered(tmp_path / "memory", "text", file, Path.read_text) == "content"
    assert remembered(file, "text", file, Path.read_text) == "content", "the folder's name is taken by a file"


def test_a_remembered_digest_of_weights_is_the_same_and_sees_one_changed_weight(tmp_path, settled):
    folder, memory = write_tiny_llama(tmp_path / "model"), tmp_path / "memory"
    settled()
    fresh = model_digest(folder)
    assert [model_digest(folder, memory) for _ in range(2)] == [fresh, fresh] and len([*memory.iterdir()]) == 1
    weights = folder / "model.safetensors"
    size, tensors = weights.stat().st_size, load_file(weights)
    next(iter(tensors.values())).view(-1)[3] += 1e-4
    save_file(tensors, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    assert model_digest(folder, memory) == model_digest(folder) != fresh


def test_a_remembered_digest_of_data_is_the_same_and_sees_one_changed_letter(tmp_path, settled):
    file, memory = tmp_path / "rows.jsonl", tmp_path / "memory"
    dataset = DatasetConfig(str(file))
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    settled()
    fresh = content_digest(dataset)
    assert [content_digest(dataset, memory) for _ in range(2)] == [fresh, fresh] and len([*memory.iterdir()]) == 1
    file.write_text('{"prompt": "A", "chosen": "b", "rejected": "c"}')
    assert content_digest(dataset, memory) == content_digest(dataset) != fresh
