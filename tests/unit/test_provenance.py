"""Digests of rows tell an edit, an order and a missing row apart; the rest of the passport names no person and no
host."""
from __future__ import annotations

import getpass
import gzip
import json
import random
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from made_tokenizers import config

from dpo_dist.config.compose import compose
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.digests import (
    FIELDS,
    RowDigests,
    any_order,
    data_set_digests,
    file_rows,
    in_order,
    pair_digests,
    row_digests,
)
from dpo_dist.data.prepare import prepare
from dpo_dist.data.records import BadRow, Record
from dpo_dist.data.row_changes import Edit, gone_and_new, row_changes
from dpo_dist.models.file_digests import digest_of
from dpo_dist.run.provenance import earlier_starts
from dpo_dist.run.provenance.changed_keys import changed_keys
from dpo_dist.run.provenance.kept import Kept, keep_export
from dpo_dist.run.provenance.made_by import Machine, code, code_files, hardware, this_machine, versions
from dpo_dist.run.provenance.parent import parent_of
from dpo_dist.runtime.run_dir import COMPLETE, RunDir
from dpo_dist.verify.configuration import config_of
from dpo_dist.verify.finding import examples, text_change, value_changes

ROWS: list[dict[str, Any]] = [{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}", "source": "made"}
                              for i in range(30)]


def digests(rows: list[dict[str, Any]]) -> RowDigests:
    return row_digests(Record(f"rows.jsonl:{i}", row) for i, row in enumerate(rows, start=1))


def edited(at: int, **fields: str) -> list[dict[str, Any]]:
    return [{**row, **fields} if i == at else row for i, row in enumerate(ROWS)]


# ---------------------------------------------------------------------------------------------------------------- rows


def test_a_row_has_the_same_digest_in_every_kind_of_file(tmp_path: Path):
    rows = [{**row, "score": float(i)} for i, row in enumerate(ROWS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps([dict(reversed(row.items())) for row in rows], indent=1))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {**rows[0], "extra": "x"}][:-1]),
                                tmp_path / "rows.parquet")
    found = {name: in_order(file_rows(tmp_path / name, None).rows) for name in (
        "rows.jsonl", "list.json", "rows.jsonl.gz", "rows.parquet")}
    assert len(set(found.values())) == 1


def test_the_order_inside_of_a_field_counts_as_templates_show_it_and_that_of_fields_does_not():
    tool, turned = {"name": "f", "type": "function"}, {"type": "function", "name": "f"}
    one, other = digests([{"tools": [tool], "a": None, "b": 1}]), digests([{"b": 1.0, "tools": [turned]}])
    assert one.rows[0] != other.rows[0]
    assert digests([{"tools": [tool], "b": 1}]).rows[0] == one.rows[0] == digests([{"b": 1.0, "tools": [tool]}]).rows[0]


def test_an_order_an_edit_and_a_missing_row_are_told_apart():
    before, shuffled = digests(ROWS), random.Random(0).sample(ROWS, len(ROWS))
    now = digests(shuffled)
    assert in_order(before.rows) != in_order(now.rows) and any_order(before.rows) == any_order(now.rows)
    assert any_order(digests(ROWS[:-1]).rows) != any_order(digests([*ROWS[:-1], ROWS[0]]).rows), "how often counts"
    changes = row_changes(before, now)
    assert changes.same_rows and changes.reordered
    changes = row_changes(before, digests(edited(7, chosen="maybe")))
    assert changes.edited == (Edit(7, 7, ("chosen",)),) and not changes.reordered and not changes.removed
    changes = row_changes(before, digests([*ROWS[:3], *ROWS[5:]]))
    assert (changes.removed, changes.added, changes.edited, changes.reordered) == ((3, 4), (), (), False)
    changes = row_changes(before, digests([{"prompt": "new"}, *ROWS]))
    assert (changes.removed, changes.added, changes.reordered) == ((), (0,), False)


def test_an_edited_row_is_found_where_others_moved_and_one_with_other_fields_is_another_row():
    before = digests(ROWS)
    changes = row_changes(before, digests([ROWS[29], *edited(7, rejected="never")[2:29]]))
    assert changes.edited == (Edit(7, 6, ("rejected",)),)
    assert (changes.removed, changes.added, changes.reordered) == ((0, 1), (), True)
    changes = row_changes(before, digests([*ROWS[1:], {"prompt": "q", "chosen": "a", "rejected": "b",
                                                       "source": "made"}]))
    assert changes.removed == (0,) and changes.added == (29,), "one field of four is too little to be the same row"
    assert row_changes(before, digests(edited(2, note="x"))).edited == (Edit(2, 2, ("note",)),), "a new field"


def test_broken_lines_odd_texts_and_many_fields_have_digests_too():
    wide = {f"f{i}": i for i in range(FIELDS + 9)}
    found = row_digests([Record("a:1", {"prompt": "\ud800", "x": float("nan")}), BadRow("a:2", "broken JSON line"),
                         Record("a:3", ["no", "dict"]), Record("a:4", wide)])
    assert len(found) == 4 == len(set(found.rows.tolist())) and found.fields.shape == (4, FIELDS)
    again = RowDigests.of_plain(json.loads(json.dumps(found.plain())))
    assert again.names == found.names and (again.fields == found.fields).all() and (again.rows == found.rows).all()
    assert len(row_digests([])) == 0 and any_order(row_digests([]).rows)


def test_gone_and_new_count_how_often_a_digest_is_there():
    def found(before: list[int], now: list[int]) -> tuple[list[int], list[int], bool]:
        gone, new, reordered = gone_and_new(np.array(before, "<u8"), np.array(now, "<u8"))
        return gone.tolist(), new.tolist(), reordered

    assert found([5, 5, 6], [5, 6]) == ([1], [], False)
    assert found([5, 6], [6, 5, 5]) == ([], [2], True)
    assert found([], []) == ([], [], False) and found([], [1]) == ([], [0], False)


def test_the_files_of_a_folder_are_named_as_seen_from_it_and_a_digest_is_remembered(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = data_set_digests(DatasetConfig(str(tmp_path / "data")), tmp_path / "memory")
    assert [file.name for file in found] == ["a/rows.jsonl", "b/rows.jsonl"]
    described = found[0].described()
    assert described["rows"] == 30 and described["bytes"] == (tmp_path / "data/a/rows.jsonl").stat().st_size
    assert str(tmp_path) not in json.dumps([file.described() for file in found])


# --------------------------------------------------------------------------------------------------------------- pairs


def pairs_of(folder: Path, rows: list[dict[str, Any]], **settings: object) -> list[int]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = config(train=(DatasetConfig(str(folder / "rows.jsonl"), "token_ids", name="rows"),),
                   cache_dir=str(folder / "tokens"), **settings)
    return pair_digests(prepare(given, None, None)[0]).tolist()


def test_pairs_have_the_same_digest_whatever_their_place_and_another_with_one_token_or_weight(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"prompt_ids": [3, i], "chosen_ids": [4, 1], "rejected_ids": [5, 1]}
                                  for i in range(5, 9)]
    found = pairs_of(tmp_path / "a", rows)
    assert len(set(found)) == 4 and pairs_of(tmp_path / "b", rows[::-1]) == found[::-1]
    other = pairs_of(tmp_path / "c", [{**rows[0], "chosen_ids": [6, 1]}, {**rows[1], "weight": 2.0}, *rows[2:]])
    assert other[0] != found[0] and other[1] != found[1] and other[2:] == found[2:]


# ------------------------------------------------------------------------------------------------------------ made by


def test_what_made_a_run_is_told_without_a_persons_or_a_hosts_name():
    machine = this_machine(0, None)
    told = json.dumps([asdict(machine), hardware([machine]), code(code_files()), versions()])
    assert machine.cores >= 1 and machine.memory_gib >= 1 and machine.cpu
    for name in {socket.gethostname(), str(Path.home())} | ({getpass.getuser()} - {"root"}):
        assert name not in told or len(name) < 4
    assert versions()["torch"] != "not installed"


def test_nodes_and_gpus_are_counted_by_kind():
    machines = [Machine(node, "Xeon", 64, 512, "H200, 140 GiB") for node in (0, 0, 1, 1)]
    assert hardware(machines) == {"nodes": {"Xeon, 64 cores, 512 GiB": 2}, "gpus": {"H200, 140 GiB": 4}}


def test_the_code_is_told_by_its_files_and_in_a_checkout_by_its_commit(tmp_path: Path):
    files = code_files()
    assert {"dpo_dist/losses.py", "conf/config.yaml"} <= files.keys()
    told = code(files)
    assert told["files"] != code({**files, "dpo_dist/losses.py": "another"})["files"]
    assert told["commit"] is None or len(told["commit"]) == 40


def test_a_run_that_goes_on_with_something_else_keeps_what_made_its_first_steps(tmp_path: Path):
    run_dir, first = RunDir(tmp_path), {"ranks": 2, "versions": {"torch": "1"}, "train_pairs": {}}
    assert earlier_starts(run_dir, first) == []
    (tmp_path / "run.json").write_text(json.dumps({"identity_of": {}, "passport": first}))
    assert earlier_starts(run_dir, {**first, "ranks": 1}) == [], "nothing of the first start was saved"
    (run_dir.checkpoint(4)).mkdir(parents=True)
    (run_dir.checkpoint(4) / COMPLETE).touch()
    assert earlier_starts(run_dir, first) == []
    second = {**first, "ranks": 1, "code": {"commit": None}}
    second["earlier"] = earlier_starts(run_dir, second)
    assert second["earlier"] == [{"until_step": 4, "ranks": 2, "versions": {"torch": "1"}}]
    (tmp_path / "run.json").write_text(json.dumps({"identity_of": {}, "passport": second}))
    assert earlier_starts(run_dir, second) == second["earlier"], "the third start is as the second"


def test_a_parent_is_a_run_whose_export_the_model_is(tmp_path: Path):
    for folder in ("run/model", "run/adapter", "run/checkpoints", "plain/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"config": {}}')
    assert parent_of(str(tmp_path / "run" / "model")) == {"run": "run", "export": "model",
                                                          "digest": digest_of({"config": {}})}
    assert parent_of(str(tmp_path / "run" / "adapter")) is not None
    assert parent_of(str(tmp_path / "run" / "checkpoints")) is None and parent_of(str(tmp_path / "plain/model")) is None
    assert parent_of("owner/model") is None


# ---------------------------------------------------------------------------------------------------------------- kept


def test_what_is_kept_is_read_as_it_was_written_and_damage_is_as_nothing(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    rows = digests(ROWS)
    Kept({"data.train[0]/0": rows}, {"train": rows.rows}, {"policy": {"tensors": {}}}, {"default": "{{ x }}"},
         {"a.py": "12"}).write(run_dir)
    run = {"config": {}, "passport": {}, "identity_of": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    keep_export(run_dir, "model", {"tensors": {"w": "F32 [1] ab"}, "files": {}})
    kept = Kept.read(run_dir)
    assert (kept.rows["data.train[0]/0"].rows == rows.rows).all() and kept.rows["data.train[0]/0"].names == rows.names
    assert (kept.rows["data.train[0]/0"].fields == rows.fields).all() and (kept.pairs["train"] == rows.rows).all()
    assert kept.templates == {"default": "{{ x }}"} and kept.exported["run"] == run
    for file in run_dir.provenance.iterdir():
        file.write_bytes(b"PK\x03\x04 not a zip")
    assert Kept.read(run_dir) == Kept() == Kept.read(RunDir(tmp_path / "nowhere"))


def test_rows_cost_at_most_20_bytes_each(tmp_path: Path):
    rows = digests([{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20_000)])
    Kept({"data.train[0]/0": rows}).write(RunDir(tmp_path))
    assert (tmp_path / "provenance" / "rows.npz").stat().st_size < 20 * 20_000


# -------------------------------------------------------------------------------------------------------- to a person


def test_a_change_of_a_text_is_told_with_its_byte_its_line_and_both_readings():
    before = "{% for m in messages %}\nä {{ m.role }}\n{% endfor %}"
    told = text_change(before, before.replace("m.role", "m.name"))
    assert told.startswith(f"from byte {len(before[:before.index('role')].encode())} (line 2) on: was ")
    assert "role" in told and "name" in told
    assert "from byte 3 (line 1) on" in text_change("abc", "abcd")


def test_changes_of_json_are_told_by_key():
    before = {"model": {"vocab": {"a": 1, "b": 2}, "merges": [["a", "b"], ["c", "d"]]}, "old": 1}
    now = {"model": {"vocab": {"a": 1, "b": 3}, "merges": [["a", "b"], ["c", "e"]]}, "new": 1}
    assert list(value_changes(before, now)) == [
        "model.vocab.b was 2, is now 3", "model.merges.1.1 was 'd', is now 'e'", "old is gone", "new is new"]
    assert changed_keys({"a": {"b": 1}}, {"a": {"b": 2, "c": None}}) == [("a.b", 1, 2)]
    assert examples(["a", "b", "c", "d"]) == "a, b, c and 1 more" and examples(["a"]) == "a"


def test_a_config_of_an_earlier_version_is_read_with_the_defaults_of_keys_that_it_lacks():
    config_now = compose(["model.path=m", "loss=ipo", "optim=muon"])
    written = to_dict(config_now)
    del written["eval"], written["train"]["keep_best"], written["data"]["train_on"]
    assert config_of({"config": written, "identity_of": config_now.identity_dict()}) == (config_now, None)


@pytest.mark.parametrize("words", [["loss=mpo"], ["reference=vllm"], ["cluster=slurm"], ["tracking=wandb"],
                                   ["reference=adapter_off", "model.lora.rank=4"], ["zero=none", "loss=sft"]])
def test_every_config_is_read_back_from_run_json_as_it_was(words: list[str]):
    given = compose(["model.path=m", "data.train=[{path: a.jsonl, weight: 2, columns: {prompt: q}}]", *words])
    assert config_of({"config": json.loads(json.dumps(to_dict(given)))}) == (given, None)


def test_a_config_that_cannot_be_read_is_that_of_the_identity_with_the_reason():
    given = compose(["model.path=m", "loss=ipo", "data.train=[{path: a.jsonl}]"])
    written = to_dict(given)
    written["loss"]["beta"] = -1.0
    found, problem = config_of({"config": written, "identity_of": given.identity_dict()})
    assert found.identity() == given.identity() and problem == "loss.beta=-1.0 must be greater than 0"
