"""Which files a data set consists of (a file, a folder, a hub data set), and what they hold, by digest."""
from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError, printable
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.runtime.files import sha256
from dpo_dist.runtime.hub_commits import commit_of, note
from dpo_dist.runtime.remember import remembered

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
# what `datasets` leaves beside its data
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = re.compile(r"(?:^|[^a-z])(train|validation|valid|dev|eval|test)(?![a-z])")
# how much larger compressed files are once they are read, about
EXPANSION = {".gz": 4, ".parquet": 3}


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
        files = tuple(Path(part["filename"]) for part in load_from_hub(dataset).cache_files)
    whole = hashlib.sha256()
    for path in files:
        whole.update(bytes.fromhex(remembered(memory, "sha256", path, sha256)))
    return whole.hexdigest()


def data_bytes(dataset: DatasetConfig) -> int:
    """About how many bytes there are to read, once they are no longer compressed."""
    files = data_files(dataset)
    if files is None:
        return sum(Path(part["filename"]).stat().st_size for part in load_from_hub(dataset).cache_files)
    return sum(path.stat().st_size * EXPANSION.get(path.suffix, 1) for path in files)


def _files_of_folder(folder: Path, split: str) -> tuple[Path, ...]:
    found = sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.name not in NOT_ROWS
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not found:
        raise UserError(f"data path '{folder}' is a folder without data files; known: {', '.join(SUFFIXES)}")
    if odd := [p for p in found if printable(str(p)) != str(p)]:
        raise UserError(f"the name of '{odd[0]}' is not UTF-8; rename the file")
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


def load_from_hub(dataset: DatasetConfig) -> Any:
    """The data set of a hub name. Asked again, it is the same commit of it. UserError where it cannot be had."""
    import datasets

    name = f"datasets/{dataset.path}" + (f"@{dataset.revision}" if dataset.revision else "")
    known = commit_of(name)
    try:
        table = datasets.load_dataset(dataset.path, dataset.subset, split=dataset.split,
                                      revision=known or dataset.revision)
        files = table.cache_files                        # none of a table that is in memory alone
        if not files:
            return table
        commit = Path(files[0]["filename"]).parent.name
        if known not in (None, commit):                  # without a network, `datasets` takes the newest that it has
            raise UserError(f"data path '{dataset.path}' was commit {known} when this run began, and the local hub "
                            f"cache has {commit}; set run.offline=false to load that commit, or begin anew in another "
                            "run.dir")
        note(name, commit)
        return table
    except UserError:
        raise
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
