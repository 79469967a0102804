"""Rows → tokens: the pipeline that fills a store, found in data.cache_dir by the content of all that it was made from,
or built there under a temporary name and renamed once complete."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import TOKENS, deciding
from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data.chat import template_text
from dpo_dist.data.files import content_digest
from dpo_dist.data.rows import read_rows
from dpo_dist.data.store import PairStore
from dpo_dist.data.tokenize import Dropped, PairTokenizer, TruncationReport, truncate
from dpo_dist.data.writer import PairWriter, Source, hash64
from dpo_dist.runtime.files import write_json

FORMAT_VERSION = 2                           # raise it when the same rows would give other tokens or files
ROWS_AT_ONCE = 512                           # tokenized in one call, in parallel
# the file with the settings that decide the tokens: by it `plan` finds a store without reading the data
SETTINGS = "asked.json"
DIGESTS = "digests"


def prepare(config: DataConfig, tokenizer: Any | None, tokenizer_digest: str | None) -> tuple[PairStore, PairStore]:
    """(training pairs, held-out pairs); the second is empty where none are asked for.

    Any number of processes may call this at once: the first to finish gives the folder its name, the others take that
    one. Raises UserError for what a person can mend.
    """
    folder = Path(config.cache_dir) / fingerprint(config, tokenizer, tokenizer_digest)[:32]
    if not folder.is_dir():
        _build(config, tokenizer, folder)
    return PairStore.open(folder / "train"), PairStore.open(folder / "eval")


def fingerprint(config: DataConfig, tokenizer: Any | None, tokenizer_digest: str | None) -> str:
    """sha256 of all that decides the stores' content: files, tokenizer, template and the values of DataConfig."""
    whole = {
        "version": FORMAT_VERSION,
        "values": {key: value for key, value in deciding(config, TOKENS).items() if key != "chat_template"},
        "contents": [content_digest(dataset, digests_folder(config)) for dataset in (*config.train, *config.eval)],
        "tokenizer": tokenizer_digest,
        "template": template_text(tokenizer, config.chat_template)}                # its text, not its file's name
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def digests_folder(config: DataConfig) -> Path:
    """Where digests of large files are remembered, those of weights too: of the folders that all ranks share, only
    data.cache_dir is there in every run."""
    return Path(config.cache_dir) / DIGESTS


def _build(config: DataConfig, tokenizer: Any | None, folder: Path) -> None:
    encoder = PairTokenizer.of(tokenizer, config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={config.cache_dir} cannot be made: {error}; set another folder") from error
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        _write(config, encoder, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:                      # another process was first, with the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(config: DataConfig, encoder: PairTokenizer, folder: Path) -> None:
    sources = _sources(config.train, "data.train")
    train = PairWriter(folder / "train", sources)
    held_out = PairWriter(folder / "eval", _sources(config.eval, "data.eval") if config.eval else sources)
    reports = [_fill(dataset, at, config, encoder, train, held_out) for at, dataset in enumerate(config.train)]
    held_out_reports = [_fill(dataset, at, config, encoder, held_out, held_out)
                        for at, dataset in enumerate(config.eval)]
    if not held_out.pairs and config.eval:
        raise UserError(f"data.eval leaves no held-out pair: {_why_none(held_out_reports)}")
    if not held_out.pairs and config.eval_fraction:
        raise UserError(f"data.eval_fraction={config.eval_fraction} holds out none of {train.pairs} pairs; raise it")
    shared = int(np.isin(np.array(held_out.prompt_hashes), np.array(train.prompt_hashes)).sum())
    dated = encoder.template is not None and "strftime_now" in encoder.template.text
    for writer, of_sources, repeated in ((train, reports, 0), (held_out, held_out_reports, shared)):
        writer.close({"sources": of_sources, "pairs_with_training_prompts": repeated, "template_asks_for_date": dated})
    write_json(folder / SETTINGS, deciding(config, TOKENS))


def _fill(dataset: DatasetConfig, source: int, config: DataConfig, encoder: PairTokenizer, writer: PairWriter,
          held_out: PairWriter) -> dict[str, Any]:
    """Reads, tokenizes, truncates and writes one data set; returns its report.

    The pairs of data.eval_fraction of the prompts go to `held_out`: which prompts, their whole content decides.
    """
    rows, read = read_rows(dataset, config.on_bad_row)
    cut = TruncationReport()
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        for pair in encoder.encode(chunk):
            kept = truncate(pair, config)
            cut.add(pair, kept)
            if not isinstance(pair, Dropped) and not isinstance(kept, Dropped):
                prompt = hash64(np.array(pair.prompt_ids, dtype="<i4").tobytes())
                (held_out if prompt < config.eval_fraction * 2**64 else writer).add(kept, source, prompt)
    return {"read": dataclasses.asdict(read), "tokens": dataclasses.asdict(cut)}


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
        reasons.update(report["read"]["bad"]["counts"])
        reasons.update(report["tokens"]["dropped"]["counts"])
    return f"{read} row(s) read; " + ("; ".join(f"{reason}: {n}" for reason, n in reasons.items())
                                      or "all of them ties")
