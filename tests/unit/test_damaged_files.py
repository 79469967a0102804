"""What a run reads back is damaged: a flipped bit, a cut, garbage, a missing file. None is believed, none crashes."""
from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows, write_tiny_llama
from damages import WAYS, cut, flip, garbage
from written_run import write_run

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.digests import RowDigests
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.dynamics.visits import Visits, read_visits, write_part
from dpo_dist.export import are_whole
from dpo_dist.launcher.status import status
from dpo_dist.models.file_digests import settings_of
from dpo_dist.models.folder import read_config, stored_tensors
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.models.whole import check_whole
from dpo_dist.next.__main__ import main as next_main
from dpo_dist.report.__main__ import main as report_main
from dpo_dist.run.generations import samples_by_step, write_generations
from dpo_dist.run.guard_log import read_events
from dpo_dist.run.provenance import check_same_run
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.run.tracking.metrics_file import MetricsFile, keep_rows_until, restore_run
from dpo_dist.runtime import remember
from dpo_dist.runtime.checksums import write_checksums
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import sealed
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.sizing.shape import read_shape
from dpo_dist.verify.__main__ import main as verify_main

# ------------------------------------------------------------------------------------------------------ the token cache


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    write_rows(tmp_path / "rows.jsonl", 40)
    return compose(["model.path=m", f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, format: token_ids}}]",
                    "data.eval_fraction=0.2", f"data.cache_dir={tmp_path / 'tokens'}"]).data


def arrays(store: PairStore) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.path.iterdir()}


def test_a_damaged_token_cache_is_made_again_whatever_is_damaged_and_how(data: DataConfig) -> None:
    whole = [arrays(store) for store in prepare(data, None, None)]
    folder = next(Path(data.cache_dir).glob("*/asked.json")).parent
    for name in sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()):
        for damages in WAYS:
            if damages is not Path.unlink and not (folder / name).stat().st_size:
                continue
            damages(folder / name)
            said: list[str] = []
            assert [arrays(store) for store in prepare(data, None, None, said.append)] == whole
            assert len(said) == 1 and str(folder) in said[0] and "it is tokenized again" in said[0], said
            assert name in said[0] or name == "CHECKSUMS.json"
    said.clear()
    prepare(data, None, None, said.append)
    assert not said and [file.name for file in Path(data.cache_dir).iterdir() if "damaged" in file.name] == []


def test_a_flipped_bit_that_makes_an_id_out_of_range_is_found(data: DataConfig) -> None:
    train = prepare(data, None, None)[0]
    first, file = train[0], train.path / "ids.npy"
    flip(file, at=file.stat().st_size - train.ids.nbytes + 3)            # of the first id's four bytes the highest
    assert np.load(file).max() >= 1 << 26
    assert prepare(data, None, None)[0][0] == first


def test_processes_that_find_the_same_damage_at_once_all_get_whole_pairs(data: DataConfig) -> None:
    stores = prepare(data, None, None)
    whole, digests, folder = [arrays(store) for store in stores], [store.digest for store in stores], (
        stores[0].path.parent)
    for _ in range(5):
        cut(folder / "train" / "ids.npy")
        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(prepare, data, None, None) for _ in range(8)]
            for run in runs:
                assert [store.digest for store in run.result()] == digests
        assert [arrays(store) for store in prepare(data, None, None)] == whole
        assert [other.name for other in Path(data.cache_dir).iterdir() if other.name.startswith(folder.name)] == [
            folder.name]


# ------------------------------------------------------------------------------------------------------ exported models


def test_every_damage_to_a_file_of_an_export_is_told_with_key_file_and_remedy(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "README.md").write_text("a card")
    write_checksums(folder)
    said: list[str] = []
    check_whole(folder, "model.path")
    assert are_whole([folder], said.append) and not said
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for damages in WAYS:
            damages(folder / name)
            with pytest.raises(UserError, match=rf"model\.path=.*{name}.*[Ee]xport it again.*CHECKSUMS\.json"):
                check_whole(folder, "model.path", tmp_path / "memory")
            assert not are_whole([folder], said.append) and name in said.pop()
            (folder / name).write_bytes(whole)
    (folder / "README.md").write_text("another card")                    # which nobody reads
    check_whole(folder, "model.path")
    assert not are_whole([folder], said.append)
    (folder / "CHECKSUMS.json").write_bytes(b"[")
    assert not are_whole([folder], said.append) and not are_whole([tmp_path / "nowhere"], said.append)
    (folder / "CHECKSUMS.json").unlink()
    flip(folder / "config.json")
    check_whole(folder, "model.path")                                    # changed on purpose


def test_a_model_without_checksums_that_is_damaged_is_one_message(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    for name, read in (("config.json", read_config), ("config.json", settings_of), ("config.json", read_shape),
                       ("model.safetensors", stored_tensors), ("tokenizer.json", load_tokenizer)):
        whole = (folder / name).read_bytes() if (folder / name).exists() else b""
        for content in (b"", b"\0" * 9, b"[]", b"{", whole[:len(whole) // 3], b"\xff" * 64, b"[" * 99_999,
                        (9).to_bytes(8, "little") + b'{"a": {}}', (8).to_bytes(8, "little") + b'{"a": 1}'):
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match="again") as told:
                read(folder)
            assert "\n" not in str(told.value)
        (folder / name).write_bytes(whole)


# -------------------------------------------------------------------------------------------------------- a run's rows


ROWS = b'{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}\n'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The copy of metrics.jsonl in a checkpoint."""
    (step := tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (step / "metrics.jsonl").write_bytes(ROWS)
    return step / "metrics.jsonl"


def restored(run: Path) -> list[str]:
    """What is said as the run's rows are held against those of its checkpoint."""
    said: list[str] = []
    restore_run(RunDir(run), run / "checkpoints" / "step-000002", said.append)
    return said


def test_rows_that_begin_as_their_copy_does_stay_as_they_are(tmp_path: Path, copy: Path) -> None:
    for more in (b"", b'{"step": 3, "split": "train"}\n', b'{"step": 3, "sp'):
        (tmp_path / "metrics.jsonl").write_bytes(ROWS + more)
        assert restored(tmp_path) == []
        assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS + more


@pytest.mark.parametrize("damaged", (b"", ROWS[:-3], ROWS.replace(b"1", b"3"), b"\0" * 200))
def test_damaged_rows_come_back_from_the_checkpoint(tmp_path: Path, copy: Path, damaged: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    assert restored(tmp_path) == ["metrics.jsonl was damaged: 2 rows restored from step-000002"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS


def test_missing_rows_come_back_from_the_checkpoint(tmp_path: Path, copy: Path) -> None:
    assert restored(tmp_path) == ["metrics.jsonl was missing: 2 rows restored from step-000002"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS


def test_an_evaluation_whose_samples_are_lost_is_made_again_so_its_metrics_go_too(tmp_path: Path, copy: Path) -> None:
    sample = b'{"step": 0}\n'
    copy.with_name("samples.jsonl").write_bytes(sample)
    (tmp_path / "metrics.jsonl").write_bytes(ROWS + b'{"step": 2, "split": "eval"}\n')
    assert restored(tmp_path) == ["samples.jsonl was missing: 1 row restored from step-000002"]
    assert (tmp_path / "samples.jsonl").read_bytes() == sample
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS


def test_rows_after_the_checkpoint_are_as_the_run_left_them_at_its_end(tmp_path: Path, copy: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_bytes(ROWS)
    tracker = MetricsFile(run, 2)
    tracker.log({"step": 2, "split": "eval", "loss": 0.25})
    tracker.finish({})
    whole = run.metrics.read_bytes()
    assert restored(tmp_path) == [] and run.metrics.read_bytes() == whole
    run.metrics.write_bytes(whole.replace(b"0.25", b"0.35"))
    assert restored(tmp_path) == ["metrics.jsonl was damaged: 2 rows restored from step-000002"]
    assert run.metrics.read_bytes() == ROWS
    tracker = MetricsFile(run, 2)
    assert not run.checksums.exists(), "a run that is under way is not at its end"
    tracker.log({"step": 2, "split": "eval", "loss": 0.5})
    assert restored(tmp_path) == []
    tracker.finish({})
    flip(run.checksums)
    assert restored(tmp_path) == [], "what is not known is not held against them"


def test_nothing_is_restored_where_the_checkpoint_has_no_rows(tmp_path: Path, copy: Path) -> None:
    copy.write_bytes(b"")
    assert restored(tmp_path) == []
    copy.unlink()                                        # a checkpoint of a run without samples
    assert restored(tmp_path) == []
    assert not (tmp_path / "metrics.jsonl").exists()


def test_half_lines_and_garbage_are_left_out_wherever_rows_are_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    junk = b'\xff\xfe\x00\n[1, 2]\n7\n{"step": "2", "split": "train"}\n{"step": 2, "split": "tr'
    run.metrics.write_bytes(b'{"step": 1, "split": "train", "loss": 0.5}\n{"step": 2, "split": "train", "loss": []}\n'
                            + junk)
    assert run.rows("train") == [{"step": 1, "split": "train", "loss": 0.5}] and run.rows("eval") == []
    sample = {"step": 0, "prompt": "p", "completion": "c c", "tokens": 2, "ended": True}
    run.samples.write_bytes(json.dumps(sample).encode() + b"\n" + junk)
    assert samples_by_step(run.samples) == {0: [sample]}
    event = {"step": 1, "guard": "length", "message": "m", "action": "stop"}
    run.guard.write_bytes(junk + b"\n" + json.dumps(event).encode() + b'\n{"step": 1, "guard": "other"}')
    assert read_events(run) == [event]
    keep_rows_until(run.metrics, 1)
    assert run.metrics.read_bytes() == b'{"step": 1, "split": "train", "loss": 0.5}\n'
    run.samples.write_bytes(junk)
    assert write_generations(run) is None


# ------------------------------------------------------------------------------------------------- what is remembered


def test_no_flipped_bit_of_a_note_is_believed(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("content")
    os.utime(file, (1_600_000_000, 1_600_000_000))
    remember.remembered(tmp_path, "text", file, Path.read_text)
    time.sleep(remember.SETTLED_SECONDS)
    remember.remembered(tmp_path, "text", file, Path.read_text)
    note = next(tmp_path.glob("*.json"))
    whole = note.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 4, 16):
            note.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            assert remember.remembered(tmp_path, "text", file, Path.read_text) == "content"


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_damaged_part_of_the_visits_is_left_out_and_told_whichever_byte_it_is(tmp_path: Path) -> None:
    n = np.arange(40)
    visits = Visits((n // 10 + 1).astype(np.int32), n.astype(np.int32), np.sin(n).astype(np.float32),
                    np.cos(n).astype(np.float32))
    write_part(tmp_path, 1, 4, 0, visits)
    write_part(tmp_path, 5, 8, 0, replace(visits, step=visits.step + 4))
    both, part = read_visits(tmp_path), tmp_path / "steps-000005-000008-rank-0.parquet"
    assert len(both) == 80
    whole = part.read_bytes()
    for at in range(len(whole)):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        said: list[str] = []
        found = read_visits(tmp_path, said.append)
        kept = both if not said else visits
        assert all(np.array_equal(getattr(found, name), getattr(kept, name)) for name in vars(kept)), at
        assert not said or (len(said) == 1 and str(part) in said[0] and "\n" not in said[0])
    for damaged in (whole[:50], whole[:-1], b"", b"PAR1"):
        part.write_bytes(damaged)
        assert len(read_visits(tmp_path, said.append)) == 40


def test_damaged_digests_of_rows_are_as_good_as_none(tmp_path: Path) -> None:
    run, numbers = RunDir(tmp_path), np.arange(6, dtype=np.uint64)
    Kept({"data.train[0]/0": RowDigests(numbers, ("a", "bc"), numbers.reshape(3, 2))}, {"train": numbers}).write(run)
    file = run.provenance / "rows.npz"
    whole = file.read_bytes()
    for at in range(8 * len(whole)):                     # any one bit
        flip(file, at // 8, 1 << at % 8)
        found = Kept.read(run)
        assert all(np.array_equal(values, numbers) for values in found.pairs.values()), at
        assert all(np.array_equal(one.rows, numbers) and one.names == ("a", "bc") for one in found.rows.values()), at
        file.write_bytes(whole)
    for damages in (cut, garbage, Path.unlink):
        file.write_bytes(whole)
        damages(file)
        assert Kept.read(run) == Kept()


# ------------------------------------------------------------------------------------------------------------ run.json


CONFIG = compose(["model.path=m", "data.train=rows.jsonl", "train.seed=1"])
LINEAGE = {"policy_weights": "w", "reference_weights": "w", "reference_key": "k", "train_pairs": 1, "dtype": "fp32",
           "copied_files": {"tokenizer.json": "t"}}


def started(folder: Path, identity: str | None = None, saved: bool = True) -> RunDir:
    """A run's folder with run.json and, where `saved`, a checkpoint that says this identity."""
    run = RunDir(folder)
    content = {"config": {}, "passport": LINEAGE, "identity_of": CONFIG.identity_dict()}
    write_json(run.run_json, sealed(content))
    if saved:
        (step := run.checkpoint(2)).mkdir(parents=True)
        (step / "state.json").write_text(json.dumps({"step": 2, **({"identity": identity} if identity else {})}))
        (step / "COMPLETE").touch()
    return run


def test_a_damaged_run_json_is_written_anew_where_the_checkpoint_is_of_this_run(tmp_path: Path) -> None:
    run = started(tmp_path, CONFIG.identity())
    assert check_same_run(run, CONFIG, LINEAGE) is None
    whole = run.run_json.read_bytes()
    for at in range(0, len(whole), 7):
        run.run_json.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        said = check_same_run(run, CONFIG, LINEAGE)
        in_the_key_of_the_digest = whole.index(b'"digest"') < at < whole.index(b'"digest"') + 8
        assert in_the_key_of_the_digest or (said is not None and "run.json was damaged (" in said), at
    for damages in (cut, garbage):
        damages(run.run_json)
        assert "run.json was damaged (" in str(check_same_run(run, CONFIG, LINEAGE))
    run.run_json.unlink()
    assert "run.json was missing" in str(check_same_run(run, CONFIG, LINEAGE))
    assert check_same_run(RunDir(tmp_path / "new"), CONFIG, LINEAGE) is None


@pytest.mark.parametrize(("now", "told"), [
    ({"tokenizer.json": "u"}, "tokenizer.json is another"), ({}, "tokenizer.json is missing"),
    ({"tokenizer.json": "t", "a.jinja": "a"}, "a.jinja is new")])
def test_a_file_that_the_export_takes_over_is_as_it_was(tmp_path: Path, now: dict[str, str], told: str) -> None:
    run = started(tmp_path, CONFIG.identity())
    with pytest.raises(UserError, match=f"model.path=m is not as it was when this run began: {told}"):
        check_same_run(run, CONFIG, {**LINEAGE, "copied_files": now})


def test_a_damaged_run_json_without_checkpoints_is_written_anew(tmp_path: Path) -> None:
    run = started(tmp_path, saved=False)
    cut(run.run_json)
    assert "run.json was damaged (" in str(check_same_run(run, CONFIG, LINEAGE))


@pytest.mark.parametrize("identity", [None, "of another run"])
def test_a_damaged_run_json_stops_where_no_checkpoint_says_that_it_is_this_run(tmp_path: Path,
                                                                               identity: str | None) -> None:
    run = started(tmp_path, identity)
    cut(run.run_json)
    with pytest.raises(UserError, match=r"run\.json was damaged"):
        check_same_run(run, CONFIG, LINEAGE)


def test_another_run_is_still_told(tmp_path: Path) -> None:
    run = started(tmp_path, CONFIG.identity())
    with pytest.raises(UserError, match=r"train\.seed was 1, is now 2"):
        check_same_run(run, compose(["model.path=m", "data.train=rows.jsonl", "train.seed=2"]), LINEAGE)


# --------------------------------------------------------------------------------------------- what is read of a folder


READ_BACK = ("run.json", "metrics.jsonl", "samples.jsonl", "guard.jsonl", "audit.json", "evaluation.json",
             "datamap.json", "generations.json", "judge.json", "pushed.json", "slurm.json", "PREEMPTED", "FAILED",
             "suspects.jsonl", "command.txt", "data.txt", "harness.json", "parity.json")


@pytest.mark.parametrize("name", READ_BACK)
def test_what_looks_at_a_run_never_ends_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                       name: str) -> None:
    write_run(tmp_path, steps=20, done=False)
    (tmp_path / "logs").mkdir()
    for content in (b"", b"\xff\xfe\x00\x80", b'{"step": 1', b"[]", b"{}", b'{"a": [1]}', b"[" * 99_999):
        (tmp_path / name).write_bytes(content)
        assert status(tmp_path).startswith("run ")
        assert report_main([str(tmp_path)]) in (0, 2)
        assert next_main([str(tmp_path)], sys.stdout) == 2
        assert verify_main([str(tmp_path)], sys.stdout) in (0, 1, 2)
        err = capsys.readouterr().err
        assert "Traceback" not in err and err.count("error: ") == len(err.splitlines())
