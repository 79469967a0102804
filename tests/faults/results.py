"""What a run left: its weights, its metrics and what it made of them, to compare two runs by."""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

# made at a run's end from files that it reads back: each pair's visits, and the evaluations
MADE_OF_FILES = ("datamap.json", "suspects.jsonl", "evaluation.json")
MADE_BY_TIME = "perf/"
TOLERANCE = 1e-6                 # of losses, where another number of ranks adds in another order
WEIGHTS_TOLERANCE = 1e-4

Rows = dict[tuple[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Results:
    weights: dict[str, Any]      # {tensor: its array}
    files: dict[str, str]        # {file of the exported model, and of MADE_OF_FILES: digest}
    rows: Rows

    @classmethod
    def of(cls, run: Path) -> Results:
        """ValueError for what cannot be read, or is there twice."""
        weights: dict[str, Any] = {}
        for file in sorted(run.glob("model/*.safetensors")):
            try:
                weights.update(load_file(file))
            except Exception as error:                   # safetensors raises errors of its own
                raise ValueError(f"{file.name} cannot be read: {error}") from error
        # the checksum of the model card, which tells of machines and starts, is in CHECKSUMS.json
        files = [file for file in run.glob("model/*") if file.suffix == ".json" and file.name != "CHECKSUMS.json"]
        files += [run / name for name in MADE_OF_FILES if (run / name).exists()]
        return cls(weights, {file.name: _digest(file) for file in files},
                   _rows(run / "metrics.jsonl"))

    def differences(self, other: Results, to_rounding: bool = False) -> list[str]:
        """What the other run has otherwise, a phrase each."""
        found = [f"no {name}" for name in self.files.keys() - other.files.keys()]
        if not to_rounding:
            found += [f"{name} differs" for name, digest in self.files.items()
                      if name in other.files and other.files[name] != digest]
        if self.weights.keys() != other.weights.keys():
            found.append(f"{len(other.weights)} tensors, not {len(self.weights)}")
        elif worst := [name for name in self.weights if _apart(self.weights[name], other.weights[name], to_rounding)]:
            found.append(f"weights differ ({len(worst)} tensors)")
        missing, further = sorted(self.rows.keys() - other.rows.keys()), sorted(other.rows.keys() - self.rows.keys())
        found += [f"metrics without {missing}"] if missing else []
        found += [f"metrics with {further}"] if further else []
        wrong = [key for key, row in self.rows.items()
                 if key in other.rows and _differ(row, other.rows[key], to_rounding)]
        return found + ([f"metrics differ at {wrong[:3]}"] if wrong else [])


def _digest(file: Path) -> str:
    """Of what the file says: a line's end that is gone from JSON says nothing."""
    said = file.read_bytes()
    if file.suffix == ".json":
        said = json.dumps(json.loads(said), sort_keys=True).encode()
    return hashlib.sha256(said).hexdigest()


def _apart(a: Any, b: Any, to_rounding: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    return bool(abs(a - b).max() > WEIGHTS_TOLERANCE) if to_rounding else a.tobytes() != b.tobytes()


def _differ(a: dict[str, Any], b: dict[str, Any], to_rounding: bool) -> bool:
    if to_rounding:
        return abs(a["loss"] - b["loss"]) > TOLERANCE
    return any(a.get(name) != b.get(name) for name in a.keys() | b.keys() if not name.startswith(MADE_BY_TIME))


def _rows(file: Path) -> Rows:
    rows: Rows = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        key = row["split"], row["step"]
        if key in rows:
            raise ValueError(f"metrics.jsonl has {key} twice")
        rows[key] = row
    return rows
