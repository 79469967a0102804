"""The next round's files: the records that a run's pairs came from, as they stand in its own, without some pairs."""
from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data.originals import originals, partners
from dpo_dist.data.store import PairStore
from dpo_dist.runtime.files import replacing


@dataclass(frozen=True)
class NextRows:
    """What was written, and how it is read."""

    train: tuple[DatasetConfig, ...]
    eval: tuple[DatasetConfig, ...]
    records: int                             # that stay, of those that training pairs came from
    left_out: int


def write_next_rows(config: DataConfig, pairs: PairStore, held_out: PairStore, dropped: Collection[int],
                    to: Path) -> NextRows:
    """Writes a file for each data set of data.train, the first `to`, the others beside it; and one of what
    data.eval_fraction held out of each. dropped: pairs that do not stay.

    A record of several pairs goes where at least half of them do, and stays whole otherwise.
    """
    train, evals, records, left_out = [], list(config.eval), 0, 0
    for at, dataset in enumerate(config.train):
        form = str(pairs.report["sources"][at]["read"]["format"])
        all_pairs = _wheres(pairs, at)
        gone = Counter(pairs.where_of(i) for i in dropped if pairs.source[i] == at)
        stay = {where for where, n in all_pairs.items() if 2 * gone[where] < n}
        records, left_out = records + len(stay), left_out + len(all_pairs) - len(stay)
        if _write(to.with_name(_numbered(to.name, at)), dataset, form, stay):
            train.append(_moved(dataset, form, to.with_name(_numbered(to.name, at))))
        if config.eval_fraction and not config.eval:
            file = to.with_name(_numbered("held_out.jsonl", at))
            if _write(file, dataset, form, set(_wheres(held_out, at))):
                evals.append(replace(_moved(dataset, form, file), weight=1.0))
    return NextRows(tuple(train), tuple(evals), records, left_out)


def _wheres(pairs: PairStore, source: int) -> Counter[str]:
    """{where a record stands: the pairs that it gave}, of one data set."""
    return Counter(pairs.where_of(i) for i in np.flatnonzero(np.asarray(pairs.source) == source).tolist())


def _write(file: Path, dataset: DatasetConfig, form: str, stay: set[str]) -> bool:
    """Writes the records; whether there are any. Of a pair that was made of two records both stay."""
    if not stay:
        file.unlink(missing_ok=True)
        return False
    other = partners(dataset, form)
    wanted = stay | {other[where] for where in stay if where in other}
    with replacing(file) as out:
        out.writelines(originals(dataset, wanted.__contains__))
    return True


def _moved(dataset: DatasetConfig, form: str, file: Path) -> DatasetConfig:
    """How the file's rows are read: as those of the data set, whose format is known by now."""
    return replace(dataset, path=str(file), format=form, split="train", subset=None, revision=None,  # type: ignore[arg-type]
                   rows=None)


def _numbered(name: str, at: int) -> str:
    """rows.jsonl, rows-2.jsonl, ..."""
    stem, dot, suffix = name.partition(".")
    return name if at == 0 else f"{stem}-{at + 1}{dot}{suffix}"
