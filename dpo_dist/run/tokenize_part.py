"""One of several processes that tokenize: python -m dpo_dist.run.tokenize_part FOLDER PART. tokenizing.py starts it."""
from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data.parts import write_part
from dpo_dist.data.rows import Share
from dpo_dist.data.tokenize import PairTokenizer
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.runtime.files import write_json

SPEC = "parts/spec.json"


@dataclass(frozen=True)
class Spec:
    """What all these processes are told, through a file in the folder that they build in."""

    config: DataConfig
    tokenizer: Path                          # the model's folder
    parts: int

    def write(self, folder: Path) -> None:
        write_json(folder / SPEC, {"config": to_dict(self.config), "tokenizer": str(self.tokenizer),
                                   "parts": self.parts})

    @staticmethod
    def read(folder: Path) -> Spec:
        told = json.loads((folder / SPEC).read_text())
        lists = {key: tuple(DatasetConfig(**entry) for entry in told["config"][key]) for key in ("train", "eval")}
        return Spec(DataConfig(**{**told["config"], **lists}), Path(told["tokenizer"]), told["parts"])


def main(folder: Path, part: int) -> None:
    gc.freeze()                              # what was imported stays: no collection needs to look at it
    spec = Spec.read(folder)
    write_part(spec.config, PairTokenizer.of(load_tokenizer(spec.tokenizer), spec.config), Share(part, spec.parts),
               folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
