"""Digests of a data file's rows and of tokenized pairs: 8 bytes each, so that an edit, an order and a missing row can
be told apart later, when the rows themselves are gone."""
from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.files import read_records
from dpo_dist.data.locate import content_digest, data_files
from dpo_dist.data.records import BadRow, Record, plain
from dpo_dist.data.store import PairStore
from dpo_dist.data.writer import IN_DIGEST, hash64
from dpo_dist.runtime.remember import remembered

FIELDS = 64                                  # of a file, so many are told apart; all count in the digest of a row
WHAT = "rows, v1"                            # what is remembered of a file; another name when a digest would be another

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class RowDigests:
    """Of n records, in file order."""

    rows: Digests                            # (n,) of all fields of a record, whatever their order
    names: tuple[str, ...]                   # F fields
    fields: NDArray[np.uint16]               # (n, F) the short digest of each field; 0 where a record lacks it

    def __len__(self) -> int:
        return len(self.rows)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"rows": _text(self.rows), "names": list(self.names), "fields": _text(self.fields)}

    @staticmethod
    def of_plain(plain: dict[str, Any]) -> RowDigests:
        rows = np.frombuffer(base64.b64decode(plain["rows"]), "<u8")
        fields = np.frombuffer(base64.b64decode(plain["fields"]), "<u2")
        return RowDigests(rows, tuple(plain["names"]), fields.reshape(len(rows), len(plain["names"])))


@dataclass(frozen=True)
class FileDigests:
    """A file of a data set: its bytes and its rows."""

    name: str                                # as seen from the data set's path
    size: int                                # bytes
    sha256: str                              # of the bytes
    rows: RowDigests

    def described(self) -> dict[str, Any]:
        """As run.json has it."""
        return {"file": self.name, "bytes": self.size, "sha256": self.sha256, "rows": len(self.rows),
                "in_order": in_order(self.rows.rows), "any_order": any_order(self.rows.rows)}


def data_set_digests(dataset: DatasetConfig, memory: Path | None) -> list[FileDigests]:
    """Of each of its files, in the order in which they are read; of a hub data set, as one. A file that is as it was
    when the folder `memory` learned of it is not read again. UserError where there is nothing to read."""
    files = data_files(dataset)
    if files is None:
        name = f"{dataset.path}[{dataset.split}]"
        return [FileDigests(name, 0, content_digest(dataset, memory), row_digests(read_records(dataset)))]
    root = Path(dataset.path).expanduser()
    return [FileDigests(str(file.relative_to(root)) if root.is_dir() else file.name, file.stat().st_size,
                        content_digest(DatasetConfig(str(file)), memory), file_rows(file, memory)) for file in files]


def file_rows(file: Path, memory: Path | None) -> RowDigests:
    """Of the records of one file."""
    return RowDigests.of_plain(remembered(memory, WHAT, file, lambda path: row_digests(
        read_records(DatasetConfig(str(path)))).plain()))


def row_digests(records: Iterable[Record | BadRow | None]) -> RowDigests:
    """Of these records, one at a time. The order of a record's fields, a field that is null, and 5 for 5.0 play no
    part, as they change with the kind of file; of what is inside a field the order counts, since templates show it."""
    rows = array("Q")
    columns: dict[str, array[int]] = {}
    for record in records:
        digests = dict(_of_fields(record))
        rows.append(hash64(b"".join(name.encode("utf-8", "surrogatepass") + b"\0" + digests[name]
                                    for name in sorted(digests))))
        for name, digest in digests.items():
            if name not in columns and len(columns) < FIELDS:
                columns[name] = array("H", bytes(2 * (len(rows) - 1)))
            if name in columns:
                columns[name].append(max(1, int.from_bytes(digest[:2], "little")))
        for column in columns.values():
            if len(column) < len(rows):
                column.append(0)
    fields = [np.frombuffer(column, "<u2") for column in columns.values()]
    return RowDigests(np.array(rows, "<u8"), tuple(columns),
                      np.stack(fields, 1) if fields else np.empty((len(rows), 0), "<u2"))


def _of_fields(record: Record | BadRow | None) -> Iterator[tuple[str, bytes]]:
    """(field, 8 bytes) of each field of a record that is there."""
    if isinstance(record, BadRow):
        record = Record(record.where, {"": f"{record.reason} {record.detail}"})
    assert record is not None, "every record is wanted"
    value = record.value if isinstance(record.value, dict) else {"": record.value}
    for name, inner in value.items():
        if inner is not None:
            content = (inner.encode("utf-8", "surrogatepass") if isinstance(inner, str)
                       else b"\0" + json.dumps(plain(inner), default=str).encode())
            yield str(name), hashlib.blake2b(content, digest_size=8).digest()


def pair_digests(pairs: PairStore) -> Digests:
    """(n,) of each pair: its tokens, which of them count, and what else training sees of it."""
    if not len(pairs):
        return np.empty(0, "<u8")
    names = np.array([hash64(source["name"].encode()) for source in pairs.meta["sources"]], "<u8")
    columns = [names[value] if name == "source" else value
               for name in ("content", *IN_DIGEST) if name not in ("ids", "spans")
               for value in [getattr(pairs, name)]]
    parts = [np.ascontiguousarray(column).view(np.uint8).reshape(len(pairs), -1) for column in columns]
    return np.array([hash64(row.tobytes()) for row in np.concatenate(parts, 1)], "<u8")


def in_order(digests: Digests) -> str:
    """Hex digest of the digests as they follow one another."""
    return hashlib.blake2b(np.ascontiguousarray(digests, "<u8").tobytes(), digest_size=16).hexdigest()


def any_order(digests: Digests) -> str:
    """Hex digest of the same in whatever order; how often each is there counts."""
    return in_order(np.sort(digests))


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
