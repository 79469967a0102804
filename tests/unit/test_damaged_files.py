"""What a run reads back is damaged: a flipped bit, a cut, garbage, a missing file. None is believed, none crashes."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from damages import WAYS, cut, flip

from dpo_dist.config.compose import compose
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.run.tracking.metrics_file import restore_rows

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


# -------------------------------------------------------------------------------------------------------- a run's rows


ROWS = b'{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}\n'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The copy of metrics.jsonl in a checkpoint."""
    (step := tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (step / "metrics.jsonl").write_bytes(ROWS)
    return step / "metrics.jsonl"


def test_rows_that_begin_as_their_copy_does_stay_as_they_are(tmp_path: Path, copy: Path) -> None:
    for more in (b"", b'{"step": 3, "split": "train"}\n', b'{"step": 3, "sp'):
        (tmp_path / "metrics.jsonl").write_bytes(ROWS + more)
        assert restore_rows(tmp_path / "metrics.jsonl", copy) is None
        assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS + more


@pytest.mark.parametrize("damaged", (b"", ROWS[:-3], ROWS.replace(b"1", b"3"), b"\0" * 200))
def test_damaged_rows_come_back_from_the_checkpoint(tmp_path: Path, copy: Path, damaged: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    said = restore_rows(tmp_path / "metrics.jsonl", copy)
    assert said == "metrics.jsonl was damaged: 2 rows restored from step-000002"
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS


def test_missing_rows_come_back_from_the_checkpoint(tmp_path: Path, copy: Path) -> None:
    said = restore_rows(tmp_path / "metrics.jsonl", copy)
    assert said == "metrics.jsonl was missing: 2 rows restored from step-000002"
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS


def test_nothing_is_restored_where_the_checkpoint_has_no_rows(tmp_path: Path, copy: Path) -> None:
    copy.write_bytes(b"")
    assert restore_rows(tmp_path / "metrics.jsonl", copy) is None
    copy.unlink()                                        # a checkpoint of a run without samples
    assert restore_rows(tmp_path / "metrics.jsonl", copy) is None
    assert not (tmp_path / "metrics.jsonl").exists()
