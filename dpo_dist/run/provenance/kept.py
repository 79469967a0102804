"""What a run keeps beside run.json, so that `dpo-dist verify` can name what changed: <run.dir>/provenance/.

    rows.npz          8 bytes for each row of each data file and for each pair, 2 for each field of a row
    models.json       of policy and reference: config.json and a digest of every tensor
    templates.json    the text of the chat templates
    code.json         a digest of every file of the package
    exported.json     of model/ and adapter/: a digest of every tensor and file; and run.json as it was then

run.json has a digest of each part, so that a part that was changed itself is told.
"""
from __future__ import annotations

import logging
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.data.digests import Digests, FileDigests, RowDigests
from dpo_dist.runtime.files import replacing, write_json
from dpo_dist.runtime.json_files import found_object
from dpo_dist.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

JSON_PARTS = ("models", "templates", "code", "exported")


@dataclass(frozen=True)
class Kept:
    """The content of the folder. A part that is not there, as in a run from before it was kept, is empty."""

    rows: dict[str, RowDigests] = field(default_factory=dict)          # {"data.train[0]/0": of its first file}
    pairs: dict[str, Digests] = field(default_factory=dict)            # {"train": of the pairs trained on, "eval": ...}
    models: dict[str, Any] = field(default_factory=dict)               # {"policy": ..., "reference": ...}
    templates: dict[str, str] = field(default_factory=dict)            # {name: text}
    code: dict[str, str] = field(default_factory=dict)                 # {file: digest}
    exported: dict[str, Any] = field(default_factory=dict)             # {"model": ..., "adapter": ..., "run": run.json}

    @staticmethod
    def read(run_dir: RunDir) -> Kept:
        parts = {name: found_object(run_dir.provenance / f"{name}.json") or {} for name in JSON_PARTS}
        return Kept(*_read_rows(run_dir.provenance / "rows.npz"), **parts)

    def write(self, run_dir: RunDir) -> None:
        """All but what is kept of the exports, which are made later."""
        run_dir.provenance.mkdir(exist_ok=True)
        arrays: dict[str, Any] = {f"pairs/{split}": digests for split, digests in self.pairs.items()}
        for name, digests in self.rows.items():
            arrays |= {f"{name}/rows": digests.rows, f"{name}/fields": digests.fields,
                       f"{name}/names": np.array(digests.names, str)}
        with replacing(run_dir.provenance / "rows.npz") as file:
            np.savez(file, **arrays)
        for name in JSON_PARTS[:-1]:
            write_json(run_dir.provenance / f"{name}.json", getattr(self, name))


def rows_of(data_sets: dict[str, list[FileDigests]]) -> dict[str, RowDigests]:
    """As Kept.rows has them."""
    return {f"{key}/{at}": file.rows for key, files in data_sets.items() for at, file in enumerate(files)}


def keep_export(run_dir: RunDir, name: str, content: dict[str, Any]) -> None:
    """Keeps what the export of this name (model, adapter) holds, and run.json as it is now."""
    run_dir.provenance.mkdir(exist_ok=True)
    path = run_dir.provenance / "exported.json"
    write_json(path, {**(found_object(path) or {}), name: content, "run": run_dir.written("export")})


def _read_rows(path: Path) -> tuple[dict[str, RowDigests], dict[str, Digests]]:
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip file: each array has a checksum
            arrays = dict(file)
        pairs = {name.removeprefix("pairs/"): array for name, array in arrays.items() if name.startswith("pairs/")}
        names = [name.removesuffix("/rows") for name in arrays if name.endswith("/rows")]
        return {name: RowDigests(arrays[f"{name}/rows"], tuple(arrays[f"{name}/names"].tolist()),
                                 arrays[f"{name}/fields"]) for name in names}, pairs
    except FileNotFoundError:
        return {}, {}
    # what numpy and zipfile were seen to raise where any one bit is flipped; RuntimeError: "encrypted"
    except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, struct.error, zlib.error,
            zipfile.BadZipFile) as error:
        log.warning("%s is damaged and is not read: %s", path, error)
        return {}, {}
