"""Rows → tokens: the pipeline that fills a store, found in data.cache_dir by the content of all that it was made from,
or built there under a temporary name and renamed once complete. Each start holds it against its checksums, once, before
it is mapped: a damaged one is removed and built again. parts.py is the same by several processes."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import TOKENS, deciding
from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data.locate import content_digest
from dpo_dist.data.rows import Chunk, ReadReport, Share, read_chunks
from dpo_dist.data.store import PairStore
from dpo_dist.data.templates import stop_tokens, template_texts
from dpo_dist.data.tokenize import Dropped, PairTokenizer, TruncationReport, truncate
from dpo_dist.data.writer import PairWriter, Source, hash64
from dpo_dist.runtime.checksums import damage, write_checksums
from dpo_dist.runtime.files import write_json

log = logging.getLogger(__name__)

FORMAT_VERSION = 5                           # raise it when the same rows would give other tokens or files
# the file with the settings that decide the tokens: by it `plan` finds a store without reading the data
SETTINGS = "asked.json"
DIGESTS = "digests"


def prepare(config: DataConfig, tokenizer: Any | None, tokenizer_digest: str | None,
            say: Callable[[str], None] = log.warning) -> tuple[PairStore, PairStore]:
    """(training pairs, held-out pairs); the second is empty where none are asked for.

    Any number of processes may call this at once: the first to finish gives the folder its name, the others take that
    one. Raises UserError for what a person can mend.
    """
    folder = store_folder(config, tokenizer, tokenizer_digest)
    if not is_whole(folder, say):
        build(config, PairTokenizer.of(tokenizer, config), folder)
    return open_stores(folder)


def build(config: DataConfig, encoder: PairTokenizer, folder: Path) -> None:
    """Reads, tokenizes and writes all pairs, alone."""
    with built(folder) as temporary:
        stores = Stores.begin(config, temporary)
        stores.complete(config, encoder, [_fill(stores, data_set, config, encoder) for data_set in data_sets(config)])


def store_folder(config: DataConfig, tokenizer: Any | None, tokenizer_digest: str | None) -> Path:
    """Where these pairs are, or will be, on disk."""
    return Path(config.cache_dir) / fingerprint(config, tokenizer, tokenizer_digest)[:32]


def is_whole(folder: Path, say: Callable[[str], None]) -> bool:
    """Whether the stores are there, each byte as it was written. Damaged ones are removed, which `say` tells.

    Any number of processes may ask at once; one that maps the damaged files keeps them. UserError where they cannot be
    removed.
    """
    try:
        asked = _identity(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    wrong = damage(folder)
    if not wrong:
        return True
    aside = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(aside)
        if _identity(aside) != asked:                # another process has built it anew meanwhile
            aside.rename(folder)
            return is_whole(folder, say)
    except FileNotFoundError:                            # another process was faster
        return is_whole(folder, say)
    except OSError as error:
        raise UserError(f"the token cache {folder} is damaged ({wrong[0]}) and cannot be removed: {error}; remove it, "
                        "or set data.cache_dir to another folder") from error
    shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink()
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    say(f"the token cache {folder} was damaged ({wrong[0]}{more}); it is tokenized again")
    return False


def _identity(folder: Path) -> tuple[int, int]:
    """Another for a folder that is built anew under the same name; the same under another name."""
    found = folder.lstat()
    return found.st_ino, found.st_mtime_ns


def open_stores(folder: Path) -> tuple[PairStore, PairStore]:
    return PairStore.open(folder / "train"), PairStore.open(folder / "eval")


def fingerprint(config: DataConfig, tokenizer: Any | None, tokenizer_digest: str | None) -> str:
    """sha256 of all that decides the stores' content: files, tokenizer, template and the values of DataConfig."""
    whole = {
        "version": FORMAT_VERSION,
        "values": {key: value for key, value in deciding(config, TOKENS).items() if key != "chat_template"},
        "contents": [content_digest(dataset, digests_folder(config)) for dataset in (*config.train, *config.eval)],
        "tokenizer": tokenizer_digest,
        "templates": template_texts(tokenizer, config.chat_template),              # their text, not a file's name
        "stops": sorted(stop_tokens(tokenizer)) if tokenizer is not None else []}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def digests_folder(config: DataConfig) -> Path:
    """Where digests of large files are remembered, those of weights too: of the folders that all ranks share, only
    data.cache_dir is there in every run."""
    return Path(config.cache_dir) / DIGESTS


@contextmanager
def built(folder: Path) -> Iterator[Path]:
    """A temporary folder, which gets its checksums and the folder's name once the block ends, and is removed where that
    fails."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={folder.parent} cannot be made: {error}; set another folder") from error
    try:
        yield temporary
        write_checksums(temporary)
        try:
            temporary.rename(folder)
        except OSError:                      # another process was first, with the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class DataSet:
    """An entry of data.train or data.eval."""

    config: DatasetConfig
    split: str                               # train or eval
    source: int                              # its place in that list


def data_sets(config: DataConfig) -> list[DataSet]:
    """All of them, in the order in which their pairs are stored."""
    return [DataSet(entry, split, source) for split, entries in (("train", config.train), ("eval", config.eval))
            for source, entry in enumerate(entries)]


@dataclass(frozen=True)
class DataSetReport:
    """What became of the rows of a data set, or of some of them."""

    read: ReadReport
    tokens: TruncationReport

    def join(self, later: DataSetReport) -> None:
        self.read.join(later.read)
        self.tokens.join(later.tokens)


@dataclass(frozen=True)
class Stores:
    """The stores of a configuration while they are filled: of pairs to train on, and of those held out."""

    folder: Path
    train: PairWriter
    held_out: PairWriter

    @staticmethod
    def begin(config: DataConfig, folder: Path) -> Stores:
        sources = _sources(config.train, "data.train")
        return Stores(folder, PairWriter(folder / "train", sources),
                      PairWriter(folder / "eval", _sources(config.eval, "data.eval") if config.eval else sources))

    def add(self, chunk: Chunk, data_set: DataSet, config: DataConfig, encoder: PairTokenizer) -> DataSetReport:
        """Tokenizes, truncates and writes a chunk's rows; what became of them.

        Of data.train, the pairs of data.eval_fraction of the prompts are held out: which ones, their content decides.
        """
        report = DataSetReport(chunk.report, TruncationReport())
        for pair in encoder.encode(chunk.rows):
            kept = truncate(pair, config)
            report.tokens.add(pair, kept)
            if not isinstance(pair, Dropped) and not isinstance(kept, Dropped):
                prompt = hash64(np.array(pair.prompt_ids, dtype="<i4").tobytes())
                trains = data_set.split == "train" and prompt >= config.eval_fraction * 2**64
                (self.train if trains else self.held_out).add(kept, data_set.source, prompt)
        return report

    def complete(self, config: DataConfig, encoder: PairTokenizer, reports: list[DataSetReport]) -> None:
        """Closes both, with the reports of all data sets, in order. Raises UserError where nothing is held out."""
        plain = [dataclasses.asdict(report) for report in reports]
        of_train, of_eval = plain[:len(config.train)], plain[len(config.train):]
        train, held_out = self.train, self.held_out
        if not held_out.pairs and config.eval:
            raise UserError(f"data.eval leaves no held-out pair: {_why_none(of_eval)}")
        if not held_out.pairs and config.eval_fraction:
            raise UserError(f"data.eval_fraction={config.eval_fraction} holds out none of {train.pairs} pairs; raise "
                            "it")
        shared = int(np.isin(np.array(held_out.prompt_hashes), np.array(train.prompt_hashes)).sum())
        dated = encoder.templates is not None and encoder.templates.ask_for_date
        for writer, of_sources, repeated in ((train, of_train, 0), (held_out, of_eval, shared)):
            writer.close({"sources": of_sources, "pairs_with_training_prompts": repeated,
                          "template_asks_for_date": dated})
        write_json(self.folder / SETTINGS, deciding(config, TOKENS))


def _fill(stores: Stores, data_set: DataSet, config: DataConfig, encoder: PairTokenizer) -> DataSetReport:
    """Reads, tokenizes, truncates and writes one data set."""
    report = DataSetReport(ReadReport.of(data_set.config), TruncationReport())
    for chunk in read_chunks(data_set.config, config.on_bad_row, Share(), config.ties):
        report.join(stores.add(chunk, data_set, config, encoder))
    report.read.check(data_set.config, config.on_bad_row)
    return report


def _sources(datasets: Iterable[DatasetConfig], key: str) -> list[Source]:
    sources = [Source(d.name or d.path, d.path, d.format, d.weight) for d in datasets]
    for at, source in enumerate(sources):
        if source.name in [other.name for other in sources[:at]]:
            raise UserError(f"{key}[{at}]: another data set is called '{source.name}' too; set a name for each")
    return sources


def _why_none(reports: list[dict[str, Any]]) -> str:
    read = sum(report["read"]["rows"] for report in reports)
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report["read"]["no_pair"])
        reasons.update(report["read"]["bad"]["counts"])
        reasons.update(report["tokens"]["dropped"]["counts"])
    return f"{read} row(s) read; " + ("; ".join(f"{reason}: {n}" for reason, n in reasons.items())
                                      or "all of them ties")
