"""Whether the data files are those of the run; else which rows, and which of their fields, are others."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig, RunConfig
from dpo_dist.data.digests import FileDigests, data_set_digests
from dpo_dist.data.files import read_records
from dpo_dist.data.prepare import data_sets
from dpo_dist.data.row_changes import RowChanges, row_changes
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.verify.finding import SHOWN, examples
from dpo_dist.verify.pairs import BOTH, Change


def data_set_changes(run: Mapping[str, Any], config: RunConfig, kept: Kept, memory: Path | None) -> list[Change]:
    """Of all data sets, in order."""
    recorded, out = run["passport"].get("data", {}), []
    for data_set in data_sets(config.data):
        key, path = f"data.{data_set.split}[{data_set.source}]", data_set.config.path
        splits = BOTH if data_set.split == "train" and config.data.eval_fraction else (data_set.split,)
        try:
            found = data_set_digests(data_set.config, memory)
        except (UserError, OSError) as error:
            out.append(Change(key, splits, str(error), "missing"))
            continue
        if key not in recorded:
            out.append(Change(key, splits, f"{path}: no digests were kept", "unrecorded"))
            continue
        out.append(_compared(key, data_set.config, splits, recorded[key], found, kept))
    return out


def _compared(key: str, dataset: DatasetConfig, splits: tuple[str, ...], before: Sequence[Mapping[str, Any]],
              found: Sequence[FileDigests], kept: Kept) -> Change:
    now, told, details = {file.name: file for file in found}, [], {}
    for at, wanted in enumerate(before):
        name = wanted["file"]
        if name not in now:
            told.append(f"{name} is gone ({wanted['rows']} rows)")
        elif now[name].sha256 != wanted["sha256"]:
            text, details[name] = _of_file(name, dataset, wanted, now[name], kept, f"{key}/{at}")
            told.append(text)
    known = {wanted["file"] for wanted in before}
    told += [f"{name} is new ({len(file.rows)} rows)" for name, file in now.items() if name not in known]
    if not told:
        rows = sum(wanted["rows"] for wanted in before)
        files = f"{len(before)} files, " if len(before) > 1 else ""
        return Change(key, splits, f"{dataset.path}: {files}{rows:,} rows, byte for byte")
    return Change(key, splits, examples(told), "changed", details)


def _of_file(name: str, dataset: DatasetConfig, wanted: Mapping[str, Any], now: FileDigests, kept: Kept,
             key: str) -> tuple[str, dict[str, Any]]:
    """(what became of a file whose bytes are others, the same for programs)."""
    described = now.described()
    if described["in_order"] == wanted["in_order"]:
        return f"{name} was written anew: the same {wanted['rows']:,} rows in the same order", {"rows": "same"}
    if described["any_order"] == wanted["any_order"]:
        return f"{name} was reordered: the same {wanted['rows']:,} rows in another order", {"rows": "reordered"}
    if key not in kept.rows:
        return f"{name}: {wanted['rows']:,} rows then, {len(now.rows):,} now, not the same ones", {"rows": "changed"}
    changes = row_changes(kept.rows[key], now.rows)
    places = _places(_file_of(dataset, name), [edit.now for edit in changes.edited[:SHOWN]] + list(
        changes.added[:SHOWN]))
    return f"{name}: {_in_words(changes, places)}", {
        "rows": "changed", "reordered": changes.reordered, "removed": [place + 1 for place in changes.removed],
        "added": [place + 1 for place in changes.added],
        "edited": [{"row": edit.now + 1, "before": edit.before + 1, "fields": list(edit.fields)}
                   for edit in changes.edited]}


def _in_words(changes: RowChanges, places: Mapping[int, str]) -> str:
    edited = [f"{places[edit.now]}" + (f" in {', '.join(edit.fields)}" if edit.fields else "")
              for edit in changes.edited[:SHOWN]]
    said = [f"{_rows(len(changes.edited))} edited: {examples(edited, len(changes.edited))}"] if edited else []
    if changes.removed:
        rows = [f"row {place + 1}" for place in changes.removed[:SHOWN]]
        said.append(f"{_rows(len(changes.removed))} removed: {examples(rows, len(changes.removed))} of the file then")
    if changes.added:
        rows = [places[place] for place in changes.added[:SHOWN]]
        said.append(f"{_rows(len(changes.added))} added: {examples(rows, len(changes.added))}")
    if changes.reordered:
        said.append("the others are in another order")
    return "; ".join(said)


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"


def _file_of(dataset: DatasetConfig, name: str) -> DatasetConfig:
    """One file of a data set; of a hub data set, all of it."""
    path = Path(dataset.path).expanduser()
    if path.is_dir():
        return DatasetConfig(str(path / name))
    return DatasetConfig(str(path)) if path.is_file() else dataset


def _places(dataset: DatasetConfig, rows: Sequence[int]) -> dict[int, str]:
    """{row: where it stands, as messages name it} of rows by number from 0."""
    wanted = set(rows)
    records = enumerate(read_records(dataset, wanted.__contains__))
    return {row: record.where.rpartition("/")[2]
            for row, record in islice(records, max(wanted, default=-1) + 1) if record is not None}
