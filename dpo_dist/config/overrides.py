"""The words of a command, looked at before Hydra sees them: what cannot be read, or would do nothing, is told here."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from dpo_dist.config.errors import UserError, nearest, one_line
from dpo_dist.config.loss_options import MIXTURE

LONGEST_WORD = 200_000                     # characters: the parser takes some seconds for as many
MOST_VALUES = 100_000                      # of an experiment's file, YAML's aliases written out
# a value that comes from outside the config, as in ${oc.env:HOME}; \${ is the text itself
FROM_OUTSIDE = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^}]*?(?::|\$\{)")
HELP = "dpo-dist run --help says what each key takes"
Choices = Mapping[str, Sequence[str]]      # {group of conf/: its choices}


def parsed(words: Sequence[str], groups: Choices, sweeps: bool = False) -> list[Override]:
    """The words as Hydra understands them. Raises UserError for the first that is no override, or would do nothing.
    sweeps: whether a word may have several values, as it may with -m."""
    found = []
    for word in words:
        found.append(override := _parsed(word))
        _check_hydra(word, override, sweeps)
        if override.is_sweep_override():
            if not sweeps:
                raise UserError(f"{_shown(word)} has several values, which are the runs of a sweep: write dpo-dist run "
                                f"-m {_shown(word)}; a list is written {override.key_or_group}=[...]")
        elif override.key_or_group in groups and override.type != OverrideType.DEL:
            _check_choice(override, groups[override.key_or_group])
    return found


def _parsed(word: str) -> Override:
    """The word as Hydra understands it, where it is sound. Raises UserError."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{_shown(word)} is not UTF-8 at character {error.start + 1}; rename what it names") from error
    if len(word) > LONGEST_WORD:
        raise UserError(f"{_shown(word[:60])}... has {len(word):,} characters, and {LONGEST_WORD:,} are read at most; "
                        "put it into a file, and give experiment=FILE.yaml")
    _check_inside(word, _shown(word))
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except Exception as error:               # HydraException, and what ANTLR and Python say of huge numbers and depths
        raise UserError(f"cannot read the override {_shown(word)}: write key=value, and quote values with special "
                        "characters, as in 'data.train=[{path: rows.jsonl, format: preference}]'") from error
    return override


def _check_inside(text: str, named: str) -> None:
    if FROM_OUTSIDE.search(text):
        raise UserError(f"{named}: ${{...:...}} takes a value from outside the config, and run.json shows all values; "
                        "let the shell fill in what is no secret, as in \"$HOME\"; \\${ is the text itself")


def _check_hydra(word: str, override: Override, sweeps: bool) -> None:
    key = override.key_or_group
    if not key:
        raise UserError(f"{_shown(word)} has no key: write key=value, as in train.seed=1")
    if re.match(r"(?:hydra|sweep)(?:$|[./@])", key) and not sweeps:
        raise UserError(f"{_shown(word)} would do nothing without a sweep (dpo-dist run -m); remove it")


def _check_choice(override: Override, choices: Sequence[str]) -> None:
    """UserError where a group's value is none of its choices."""
    group, value = override.key_or_group, override.value()
    if override.package is not None:
        raise UserError(f"{_shown(override.input_line)}: a group has its one place; write {group}=...")
    if group == "loss" and value == MIXTURE:
        raise UserError(f"loss={MIXTURE} is not a choice: loss=rpo and loss=mpo are mixtures; for one of your own set "
                        f"loss.name={MIXTURE} and loss.terms={{sigmoid: 1.0, sft: 0.5}}")
    if not isinstance(value, str) or value not in choices:
        written = (override.input_line or "").partition("=")[2]
        raise UserError(f"{one_line(f'{group}={written}')} is not a choice: {nearest(written, choices)}")


def blamed(words: Sequence[str], composes: Callable[[Sequence[str]], object], error: Exception) -> str:
    """What is said where Hydra refuses words for a reason of its own: the first that it refuses alone, and why."""
    for word in words:
        try:
            composes([word])
        except UserError as told:
            return str(told)
        except Exception as alone:           # as in composed
            return f"cannot set {_shown(word)}: {_reason(alone)}; {HELP}"
    return f"{_shown(' '.join(words))} do not go together: {_reason(error)}; {HELP}"


def _reason(error: BaseException) -> str:
    """The innermost message that says something."""
    inner = error.__cause__ or error.__context__
    text = _reason(inner) if inner is not None and str(inner) not in ("", "None") else str(error)
    return one_line(next(iter(text.splitlines()), "")) or type(error).__name__


def experiment_file(path: Path, word: str) -> DictConfig:
    """What an experiment's file of a user's own says. Raises UserError, with the word that names it."""
    try:
        text = path.read_text()
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise UserError(f"{word}: the file holds {type(values).__name__}, and no mapping; write keys as in conf/, "
                            "such as optim: {lr: 1e-6}")
        _check_inside(text, word)
        if "hydra" in values:
            raise UserError(f"{word}: its key hydra would do nothing; remove it")
        if _size(values, {}) > MOST_VALUES:
            raise UserError(f"{word}: the file holds more than {MOST_VALUES:,} values, its aliases written out; a file "
                            "of settings has fewer")
        loaded = OmegaConf.load(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{word} cannot be read: {error.strerror}; give another file") from error
    except Exception as error:               # what PyYAML and OmegaConf say, of depth and huge numbers too
        raise UserError(f"{word} is no YAML that can be read: {one_line(' '.join(str(error).split()))}; mend the "
                        "file") from error
    assert isinstance(loaded, DictConfig)
    return loaded


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are, each alias written out. RecursionError for one that holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_size(inner, known) for inner in (
            value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _shown(word: str | None) -> str:
    return f"'{one_line(word or '')}'"
