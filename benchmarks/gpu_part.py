"""A part of gpu.py as a process of its own: its arguments, and the rows of results that it prints. No torch here: a
part with nothing left to do ends at once."""
from __future__ import annotations

import argparse
import json
import re
from typing import Any


def arguments() -> argparse.Namespace:
    """Of a part's process: which part, which cases are wanted, which are done."""
    words = argparse.ArgumentParser()
    words.add_argument("part")
    words.add_argument("--cases", default=".*")
    words.add_argument("--done", nargs="*", default=[])
    words.add_argument("--smoke", action="store_true")
    return words.parse_args()


def is_wanted(given: argparse.Namespace, case: str) -> bool:
    """Whether the case is to be measured: asked for, and not done already."""
    return f"{given.part}/{case}" not in given.done and re.fullmatch(given.cases, case) is not None


def tell(case: str, **figures: Any) -> None:
    """Prints one row of results, which gpu.py reads."""
    print(json.dumps({"case": case, **figures}), flush=True)


def rounded(values: dict[str, float], digits: int = 5) -> dict[str, float]:
    return {name: float(f"{value:.{digits}g}") for name, value in values.items()}
