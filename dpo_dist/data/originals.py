"""The records of a data set as they stand in its files, for a file of some of them."""
from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import IO, cast

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.columns import Columns, named
from dpo_dist.data.files import is_json_lines, read_records
from dpo_dist.data.formats import FORMATS
from dpo_dist.data.locate import data_files
from dpo_dist.data.records import Record, json_ready

Where = str                                  # "file:line", as each pair has it


def originals(dataset: DatasetConfig, is_wanted: Callable[[Where], bool]) -> Iterator[bytes]:
    """The wanted records, each as a line of JSON that is read as the record was: of JSON lines the very bytes, of other
    kinds of files, and of hub sets, their values."""
    files = data_files(dataset)
    if files is None:
        yield from _values(dataset, is_wanted)
        return
    for path in files:
        if is_json_lines(path):
            with cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if is_wanted(f"{path}:{number}"):
                        yield line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") + b"\n"
        else:
            yield from _values(DatasetConfig(str(path)), is_wanted)


def _values(dataset: DatasetConfig, is_wanted: Callable[[Where], bool]) -> Iterator[bytes]:
    for record in read_records(dataset):
        if isinstance(record, Record) and is_wanted(record.where):
            yield json.dumps(json_ready(record.value), ensure_ascii=False).encode() + b"\n"


def partners(dataset: DatasetConfig, form: str) -> dict[Where, Where]:
    """{where a pair's record stands: where the other record stands that the pair was made of}; empty for formats whose
    pairs are made of one."""
    group = FORMATS[form].group
    if group is None:
        return {}
    records = named(read_records(dataset), Columns(dataset.columns))
    return {record.where: record.other for record in group(r for r in records if r is not None)
            if isinstance(record, Record) and record.other is not None}
