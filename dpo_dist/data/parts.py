"""The stores of a configuration, built by several processes: each tokenizes its share of every data set and writes it
as a part, from files that it reads itself; then one process lays the parts end to end, chunk by chunk, which gives the
very bytes that it would have written alone.

    <temporary folder>/parts/<number>/train, eval     the stores of that part's pairs
    <temporary folder>/parts/<number>/chunks.jsonl    a line for each of its chunks: reports, and where its pairs end
    <temporary folder>/parts/<number>/records         how many records it has done, for a progress bar
    <temporary folder>/parts/mistakes/                empty files, named after chunks with a mistake: later chunks need
                                                      no tokens, as the run will end with a message
"""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.prepare import DataSet, DataSetReport, Stores, data_sets
from dpo_dist.data.rows import Chunk, ReadReport, Share, Tally, read_chunks
from dpo_dist.data.tokenize import PairTokenizer, TruncationReport
from dpo_dist.data.writer import ARRAYS, places_of

PARTS, MISTAKES = "parts", "parts/mistakes"
Ends = dict[str, dict[str, int]]             # {train or eval: {array: its rows}}
AFTER_ALL_CHUNKS = 10**9 - 1
NOTHING: Ends = {split: dict.fromkeys(ARRAYS, 0) for split in ("train", "eval")}


@dataclass(frozen=True)
class Line:
    """What a part says of one chunk."""

    data_set: int                            # place among data_sets(config)
    chunk: int
    read: dict[str, Any]                     # ReadReport
    tokens: dict[str, Any]                   # TruncationReport
    ends: Ends                               # of the part's stores, after this chunk
    # the message of a UserError, and whether it came from reading, which no earlier bad row takes precedence over
    error: str | None = None
    unreadable: bool = False

    @property
    def report(self) -> DataSetReport:
        def tallies(plain: dict[str, Any], *names: str) -> dict[str, Any]:
            return {**plain, **{name: Tally(**plain[name]) for name in names}}

        return DataSetReport(ReadReport(**tallies(self.read, "bad")),
                             TruncationReport(**tallies(self.tokens, "dropped", "left_out")))


# ------------------------------------------------------------------------------------------------------- writing a part


def part_folder(folder: Path, part: int) -> Path:
    return folder / PARTS / str(part)


def begin_parts(folder: Path, parts: int) -> None:
    """Makes the folders of that many parts: before any process looks for one, as a network file system may remember for
    a minute that there was none."""
    (folder / MISTAKES).mkdir(parents=True)
    for part in range(parts):
        part_folder(folder, part).mkdir()
        (part_folder(folder, part) / "records").write_text("0")


def write_part(config: DataConfig, encoder: PairTokenizer, share: Share, folder: Path) -> None:
    """Writes one part. What a person can mend goes into it as well, and is raised by `join_parts`."""
    own = part_folder(folder, share.part)
    mistakes = _Mistakes(folder / MISTAKES)
    stores = Stores.begin(config, own)
    with (own / "chunks.jsonl").open("w") as lines, (own / "records").open("r+") as progress:
        done = 0
        for number, data_set in enumerate(data_sets(config)):
            if mistakes.before(number, 0):
                break
            for line in _lines(stores, number, data_set, config, encoder, share, mistakes):
                lines.write(json.dumps(dataclasses.asdict(line)) + "\n")
                done += line.read["rows"]
                os.pwrite(progress.fileno(), f"{done:12}".encode(), 0)          # never empty for who reads it
    for writer in (stores.train, stores.held_out):
        writer.close_part()


def _lines(stores: Stores, number: int, data_set: DataSet, config: DataConfig, encoder: PairTokenizer, share: Share,
           mistakes: _Mistakes) -> Iterator[Line]:
    """A line for each chunk of the share; one more where the files cannot be read to their end."""
    chunk = Chunk(-1, [], ReadReport.of(data_set.config))

    def line(report: DataSetReport, error: str | None = None, unreadable: bool = False) -> Line:
        ends = {"train": stores.train.rows(), "eval": stores.held_out.rows()}
        if error or (config.on_bad_row == "error" and report.read.bad.counts):
            mistakes.note(number, AFTER_ALL_CHUNKS if unreadable else chunk.number)
        return Line(number, chunk.number, dataclasses.asdict(report.read), dataclasses.asdict(report.tokens), ends,
                    error, unreadable)

    try:
        for chunk in read_chunks(data_set.config, config.on_bad_row, share, config.ties):
            if mistakes.before(number, chunk.number):
                chunk.rows.clear()
            try:
                yield line(stores.add(chunk, data_set, config, encoder))
            except UserError as error:
                yield line(DataSetReport(chunk.report, TruncationReport()), str(error))
    except UserError as error:
        yield line(DataSetReport(ReadReport.of(data_set.config), TruncationReport()), str(error), unreadable=True)


@dataclass(frozen=True)
class _Mistakes:
    """The chunks in which any of the processes has found a mistake."""

    folder: Path

    def note(self, data_set: int, chunk: int) -> None:
        if not self.before(data_set, chunk):           # only the first is of interest
            (self.folder / _name(data_set, chunk)).touch()

    def before(self, data_set: int, chunk: int) -> bool:
        """Whether there is one in an earlier chunk."""
        return min(os.listdir(self.folder), default="~") < _name(data_set, chunk)


def _name(data_set: int, chunk: int) -> str:
    return f"{data_set:05d}-{chunk:09d}"


# ---------------------------------------------------------------------------------------------------------- joining all


def records_done(folder: Path, parts: int) -> int:
    """How many records all parts have done by now."""
    return sum(int((part_folder(folder, part) / "records").read_text()) for part in range(parts))


def join_parts(config: DataConfig, encoder: PairTokenizer, folder: Path, parts: int) -> None:
    """Completes the stores in the folder from its parts, which are removed. Raises the UserError that one process alone
    would have raised."""
    stores = Stores.begin(config, folder)
    readers = [_Part(part_folder(folder, part)) for part in range(parts)]
    reports = []
    for number, data_set in enumerate(data_sets(config)):
        report = DataSetReport(ReadReport.of(data_set.config), TruncationReport())
        for chunk in count():
            line = readers[chunk % parts].move(number, stores)
            if line is None:
                break
            only_counting = config.on_bad_row == "error" and report.read.bad.counts
            if line.error and (line.unreadable or not only_counting):
                raise UserError(line.error)
            assert line.chunk == chunk, "each part has every chunk of its share"
            report.join(line.report)
        report.read.check(data_set.config, config.on_bad_row)
        reports.append(report)
    stores.complete(config, encoder, reports)
    shutil.rmtree(folder / PARTS)


class _Part:
    """A part that is read from its beginning to its end, once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lines = (Line(**json.loads(text)) for text in (folder / "chunks.jsonl").read_text().splitlines())
        self._next = next(self._lines, None)
        self._ends = NOTHING
        self._places = {split: places_of(folder / split) for split in NOTHING}

    def move(self, data_set: int, stores: Stores) -> Line | None:
        """The line of the next chunk of this data set, whose pairs are appended to the stores; None after the last."""
        line = self._next
        if line is None or line.data_set != data_set:
            return None
        for split, writer in (("train", stores.train), ("eval", stores.held_out)):
            writer.extend(self._folder / split, self._places[split], self._ends[split], line.ends[split])
        self._ends, self._next = line.ends, next(self._lines, None)
        return line
