"""Files and hub data sets → raw records, each with the place it came from, one at a time.

JSON and CSV are read with the standard library: the `datasets` readers guess one schema for a whole file (rows whose
fields differ are a crash, "NA" becomes null, "007" becomes 7) and cannot say on which line a broken row stands. Parquet
(streamed) and the hub go through `datasets`.
"""
from __future__ import annotations

import csv
import gzip
import json
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
from dpo_dist.data.locate import data_files, load_from_hub
from dpo_dist.data.messages import chat_in_text, value_in_text
from dpo_dist.data.padding import Padding
from dpo_dist.data.records import BadRow, Record

CHUNK_CHARS = 1 << 20
ARROW_ROWS = 512                             # of an Arrow table, at once
Wanted = Callable[[int], bool]               # of the records of a data set, by number from 0: shall it be parsed?
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
        yield from _from_arrow(f"{name}[{dataset.split}]", load_from_hub(dataset), is_wanted)
        return
    for path in files:
        try:
            yield from _read_file(path, is_wanted)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}; mend or replace the file") from error


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


def is_json_lines(path: Path) -> bool:
    """Whether the file has a JSON object a line, and is no list, table or CSV."""
    if path.suffix == ".parquet" or ".csv" in path.suffixes:
        return False
    with cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb") as stream:
        return _first_character(stream) != b"["


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
            rest, line = window[start + 1:], lines_before + window.count("\n", 0, start) + 1
            while rest and not rest.strip():
                rest = stream.read(CHUNK_CHARS)
            if rest:                         # JSON lines that begin with a list, or two files in one
                raise UserError(f"{path}:{line}: more follows after the list's end, after row {row}; mend the file, or "
                                "write one object a line (.jsonl)")
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
