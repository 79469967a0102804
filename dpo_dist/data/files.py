"""Files, folders and hub data sets → raw records, each with the place it came from, one at a time.

JSON and CSV are read with the standard library: the `datasets` readers guess one schema for a whole file (rows whose
fields differ are a crash, "NA" becomes null, "007" becomes 7) and cannot say on which line a broken row stands. Parquet
(streamed) and the hub go through `datasets`.
"""
from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import IO, Any, TextIO, cast

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.fields import Unfit
from dpo_dist.data.messages import chat_in_text, value_in_text
from dpo_dist.data.padding import Padding
from dpo_dist.data.records import BadRow, Record
from dpo_dist.runtime.remember import remembered

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
# what `datasets` leaves beside its data
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = re.compile(r"(?:^|[^a-z])(train|validation|valid|dev|eval|test)(?![a-z])")
CHUNK_CHARS = 1 << 20
ARROW_ROWS = 512                             # of an Arrow table, at once
Wanted = Callable[[int], bool]               # of the records of a data set, by number from 0: shall it be parsed?
# how much larger compressed files are once they are read, about
EXPANSION = {".gz": 4, ".parquet": 3}
NULL = re.compile("null|None")
TOO_MUCH = (RecursionError, ValueError)      # JSON nested too deeply, a number of more than 4,300 digits


def read_records(dataset: DatasetConfig, wanted: Wanted = lambda number: True) -> Iterator[Record | BadRow | None]:
    """The records of a data set, in file order; None for each that is not wanted, which is not even parsed where the
    file allows that. Raises UserError for what is missing or unreadable as a whole."""
    files, numbers = data_files(dataset), count()

    def is_wanted() -> bool:                 # asked once for each record, in order
        return wanted(next(numbers))

    if files is None:
        name = f"{dataset.path}/{dataset.subset}" if dataset.subset else dataset.path
        yield from _from_arrow(f"{name}[{dataset.split}]", _load_from_hub(dataset), is_wanted)
        return
    for path in files:
        try:
            yield from _read_file(path, is_wanted)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}; mend or replace the file") from error


def data_files(dataset: DatasetConfig) -> tuple[Path, ...] | None:
    """The local files of a data set, sorted; None if `path` is a hub name. UserError if there is nothing to read."""
    path = Path(dataset.path).expanduser()
    if path.is_dir():
        return _files_of_folder(path, dataset.split)
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", dataset.path) and not dataset.path.endswith(SUFFIXES):
            return None
        raise UserError(f"data path '{dataset.path}' does not exist (looked in {Path.cwd()}); give a file, a folder or "
                        "a hub name")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data path '{dataset.path}' is not a kind of file that can be read; known: "
                        f"{', '.join(SUFFIXES)}")
    if dataset.split != "train":
        raise UserError(f"split='{dataset.split}' would do nothing for the single file '{dataset.path}'; remove it")
    return (path,)


def content_digest(dataset: DatasetConfig, memory: Path | None = None) -> str:
    """sha256 over the content of the data set's files, and of nothing else. A file that is as it was when a digest in
    the folder `memory` was made is not read again."""
    files = data_files(dataset)
    if files is None:
        files = tuple(Path(part["filename"]) for part in _load_from_hub(dataset).cache_files)
    whole = hashlib.sha256()
    for path in files:
        whole.update(bytes.fromhex(remembered(memory, "sha256", path, _sha256)))
    return whole.hexdigest()


def data_bytes(dataset: DatasetConfig) -> int:
    """About how many bytes there are to read, once they are no longer compressed."""
    files = data_files(dataset)
    if files is None:
        return sum(Path(part["filename"]).stat().st_size for part in _load_from_hub(dataset).cache_files)
    return sum(path.stat().st_size * EXPANSION.get(path.suffix, 1) for path in files)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files_of_folder(folder: Path, split: str) -> tuple[Path, ...]:
    found = sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.name not in NOT_ROWS
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not found:
        raise UserError(f"data path '{folder}' is a folder without data files; known: {', '.join(SUFFIXES)}")
    # If files are named after splits (train-00000.parquet, test/…), only those of the requested split are read.
    splits = {p: SPLITS.findall(str(p.relative_to(folder)).lower()) for p in found}
    if not any(splits.values()):
        if split != "train":
            raise UserError(f"split='{split}' would do nothing: no file of '{folder}' is named after a split; remove "
                            "it")
        return tuple(found)
    unnamed = [p for p in found if not splits[p]]
    if unnamed:
        raise UserError(f"'{unnamed[0]}' is named after no split while other files of '{folder}' are; list the files "
                        "one by one")
    chosen = tuple(p for p in found if split in splits[p])
    if not chosen:
        names = sorted({name for inner in splits.values() for name in inner})
        raise UserError(f"split='{split}' matches no file of '{folder}'; set split in its data entry to one of: "
                        f"{', '.join(names)}")
    return chosen


def _read_file(path: Path, is_wanted: Callable[[], bool]) -> Iterator[Record | BadRow | None]:
    if path.suffix == ".parquet":
        yield from _from_arrow(str(path), _stream_parquet(path), is_wanted)
        return
    yield from _read_text_file(path, Padding(lambda: _values(path)), is_wanted)


def _read_text_file(path: Path, padding: Padding | None,
                    is_wanted: Callable[[], bool]) -> Iterator[Record | BadRow | None]:
    """padding None: the records just as they are written."""
    with cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb") as stream:
        if ".csv" in path.suffixes:
            yield from _read_csv(path, TextIOWrapper(stream, encoding="utf-8-sig", newline=""), padding, is_wanted)
        elif _first_character(stream) == b"[":
            yield from _read_json_list(path, TextIOWrapper(stream, encoding="utf-8-sig"), padding, is_wanted)
        else:
            yield from _read_json_lines(path, stream, padding, is_wanted)


def _values(path: Path) -> Iterator[Any]:
    """The records of a file once more, for what a whole file says of its nulls."""
    yield from (record.value for record in _read_text_file(path, None, lambda: True) if isinstance(record, Record))


# ----------------------------------------------------------------------------------------------------------------- JSON


def _first_character(stream: IO[bytes]) -> bytes:
    head = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return head[:1]


def _read_json_lines(path: Path, stream: Iterable[bytes], padding: Padding | None,
                     is_wanted: Callable[[], bool]) -> Iterator[Record | BadRow | None]:
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        if not is_wanted():
            yield None
            continue
        where = f"{path}:{number}"
        try:
            text = line.decode()
            value = json.loads(text)
            yield Record(where, padding.without(value) if padding and "null" in text else value)
        except UnicodeDecodeError as error:
            yield BadRow(where, "broken JSON line", f"not UTF-8 at byte {error.start + 1}")
        except json.JSONDecodeError as error:
            yield BadRow(where, "broken JSON line", f"{error.msg} at column {error.colno}")
        except TOO_MUCH as error:
            yield BadRow(where, "broken JSON line", str(error))


def _read_json_list(path: Path, stream: TextIO, padding: Padding | None,
                    is_wanted: Callable[[], bool]) -> Iterator[Record | None]:
    """The entries of one big list, decoded one by one from a sliding window: the whole file is never in memory."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    window = stream.read(CHUNK_CHARS)
    at, row, lines_before, at_end = window.index("[") + 1, 0, 0, False

    def skip_blank(position: int) -> int:
        match = blank.match(window, position)
        assert match
        return match.end()

    while True:
        start = skip_blank(at)
        if window[start:start + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(window, start)
        except json.JSONDecodeError as error:
            failure, separator, end = error.msg, "", error.pos
        except TOO_MUCH as error:            # reading more of the file would not help
            failure, separator, end, at_end = str(error), "", start, True
        else:
            end = skip_blank(end)
            separator = window[end:end + 1]
            failure = "',' or ']' expected" if separator else "the list is not closed"
        if separator in (",", "]"):
            row += 1
            yield Record(f"{path}:row {row}", padding.without(value) if padding else value) if is_wanted() else None
            at = end + (separator == ",")
        elif at_end:
            line = lines_before + window.count("\n", 0, end) + 1
            raise UserError(f"{path}:{line}: broken JSON after row {row}: {failure}; mend the file, or write one "
                            "object a line (.jsonl), where a broken row can be skipped")
        else:                                # the window doubles: decoding a long row again stays linear overall
            more = stream.read(max(CHUNK_CHARS, len(window)))
            at_end = not more
            lines_before += window.count("\n", 0, start)
            window, at = window[start:] + more, 0


# ---------------------------------------------------------------------------------------------------- CSV, parquet, hub


def _read_csv(path: Path, stream: TextIO, padding: Padding | None,
              is_wanted: Callable[[], bool]) -> Iterator[Record | BadRow | None]:
    csv.field_size_limit(2**31 - 1)          # the default of 131,072 characters is less than a long answer
    reader = csv.DictReader(stream, strict=True)
    try:
        line = reader.line_num if reader.fieldnames else 0
        for cells in reader:
            where, line = f"{path}:{line + 1}", reader.line_num      # a record may span lines: name its first
            if not is_wanted():
                yield None
                continue
            if None in cells:
                yield BadRow(where, "more cells than the header has")
                continue
            # an empty cell is what tables write for null
            value = {key: text if padding and not NULL.search(text) else _structure(key, text)
                     for key, text in cells.items() if text}
            yield Record(where, padding.without(value) if padding else value)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}; mend the file") from error


def _structure(key: str, text: str) -> Any:
    """The chat or the tools in a cell, any other text as it is. A CSV has no other way to hold them, so a table may
    have added nulls to them."""
    try:
        return value_in_text(text) or text if key == "tools" else chat_in_text(text, key)
    except Unfit:                            # said when the columns are read
        return text


def _stream_parquet(path: Path) -> Any:
    import datasets  # here, because its import takes longer than reading most files

    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error


def _from_arrow(name: str, table: Any, is_wanted: Callable[[], bool]) -> Iterator[Record | None]:
    """Rows of an Arrow table, without the nulls that its one schema puts into every struct that lacks a field."""
    padding = Padding(None)
    try:
        for number, row in enumerate(_arrow_rows(table, is_wanted), start=1):
            yield None if row is None else Record(f"{name}:row {number}", padding.without(row))
    except ValueError as error:              # pyarrow's own errors are ValueErrors
        raise UserError(f"{name} cannot be read: {error}; mend or replace the file") from error


def _arrow_rows(table: Any, is_wanted: Callable[[], bool]) -> Iterator[dict[str, Any] | None]:
    """The rows of a data set of `datasets`, as its own iterator gives them; None for one that is not wanted: most of
    the time goes into making Python's objects."""
    for batch in table.with_format("arrow").iter(batch_size=ARROW_ROWS):
        wanted = [is_wanted() for _ in range(len(batch))]
        rows = batch.to_pylist() if any(wanted) else [None] * len(batch)
        for row, is_own in zip(rows, wanted, strict=True):
            yield table.features.decode_example(row) if is_own else None


def _load_from_hub(dataset: DatasetConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(dataset.path, dataset.subset, split=dataset.split, revision=dataset.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:    # offline and not found are OSErrors
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        if offline:
            why = "the network is off (HF_HUB_OFFLINE) and it is not in the local hub cache"
            remedy = "set run.offline=false to download it, or give"
        else:
            why = str(error).splitlines()[0]
            remedy = "check name, split, subset and revision, or give"
        asked = ", ".join(f"{key} '{value}'" for key in ("split", "subset", "revision")
                          if (value := getattr(dataset, key)))
        raise UserError(f"data path '{dataset.path}' ({asked}) is no file or folder in {Path.cwd()}, and "
                        f"cannot be loaded as a hub data set: {why}; {remedy} a file") from error
