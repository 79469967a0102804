"""How a configuration key is declared: its range, and what it decides. conf/ holds its default and meaning."""
from __future__ import annotations

import dataclasses
import json
from typing import Any

RUN = "run"            # part of a run's identity: another value makes another run
TOKENS = "tokens"      # decides the tokenized pairs, besides the content of files and of the tokenizer
VALUES = "values"      # decides the reference's log-probs, besides weights and tokens


def option(*decides: str, above: float | None = None, between: tuple[float, float] | None = None,
           default: Any = dataclasses.MISSING, unnamed: Any = dataclasses.MISSING) -> Any:
    """A field of a config dataclass. decides: any of RUN, TOKENS and VALUES; a key with none of them changes where or
    how a run computes, not what. above, between: the range of its value, which decode.py checks. unnamed: the value at
    which the key is left out of what it decides, so that runs from before the key existed are found again."""
    return dataclasses.field(default=default, metadata={"decides": decides, "above": above, "between": between,
                                                        "unnamed": unnamed})


def deciding(config: Any, what: str) -> dict[str, Any]:
    """The keys of a config dataclass that decide the run, the tokens or the values; nested, JSON-ready."""
    return {f.name: _plain(getattr(config, f.name), what) for f in dataclasses.fields(config)
            if what in f.metadata["decides"] and getattr(config, f.name) != f.metadata["unnamed"]}


def _plain(value: Any, what: str) -> Any:
    if dataclasses.is_dataclass(value):
        return deciding(value, what)
    if isinstance(value, list | tuple):
        return [_plain(entry, what) for entry in value]
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A plain, JSON-ready copy of a config dataclass (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(key: str, value: Any) -> str:
    """The key and its value as a person writes them in a command."""
    return f"{key}={'null' if value is None else str(value).lower()}"
