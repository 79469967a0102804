"""conf/ + overrides → RunConfig. Writes nothing and imports no torch, so every rank may compose for itself.

Hydra's own exceptions become one message each, with the nearest valid name.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dpo_dist.config.decode import decode
from dpo_dist.config.errors import UserError, nearest, one_line
from dpo_dist.config.overrides import blamed, experiment_file, parsed
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.secrets import refuse_secret_words


def shipped(name: str) -> Path:
    """A file or folder that comes with the package: inside it once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


def conf_dir() -> Path:
    """Where the YAML files are."""
    return shipped("conf")


def compose(overrides: Sequence[str]) -> RunConfig:
    """The validated RunConfig of `key=value` overrides. Raises UserError, on one line, for what a person can mend."""
    raw: dict[str, Any] = {}
    try:
        raw = composed(overrides)
        return decode(raw)
    except OSError as error:                 # of a path that a rule looks at: too long, or not to be looked at
        key = next((key for key, value in _leaves(raw) if value and str(error.filename).startswith(value)), "")
        raise UserError(f"{key}={one_line(str(error.filename))} cannot be looked at: {error.strerror}; give another "
                        "path") from error
    except UserError as error:
        if (told := one_line(str(error))) == str(error):
            raise
        raise UserError(told) from error


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The same before it is decoded, when keys may still contradict each other. Raises UserError for unknown ones."""
    refuse_secret_words(overrides)
    words = with_groups(overrides)
    understood = parsed(words, _groups())
    try:
        return _to_plain(_compose(words))
    # Hydra, OmegaConf and ANTLR raise much besides their own: TypeError, AssertionError, RecursionError, ...
    except Exception as error:
        raise UserError(_explain(overrides, understood, error)) from error


def _compose(words: Sequence[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra_compose(config_name="config", overrides=list(words))


def parsed_for_sweep(words: Sequence[str]) -> list[Override]:
    """The words of `run -m` as Hydra understands them, in which a key may have several values. Raises UserError."""
    return parsed(with_groups(words), _groups(), sweeps=True)


def _groups() -> dict[str, list[str]]:
    """{group: its choices}; of experiments also a user's own file, once it is known to Hydra."""
    groups = {folder.name: choices(folder.name) for folder in conf_dir().iterdir() if folder.is_dir()}
    groups["experiment"] += _own_experiments
    return groups


def with_groups(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra takes them: reference.engine=zero chooses the group as reference=zero does, and
    experiment=FILE.yaml reads a file of the user's own as if it stood in conf/experiment/."""
    return [_own_experiment(word) if word.startswith("experiment=") else _group_of(word, overrides)
            for word in overrides]


def _group_of(word: str, overrides: Sequence[str]) -> str:
    """group=variant for the key that names a variant, unless its group is chosen as well."""
    key, _, value = word.partition("=")
    for group, name in (("reference", "engine"), ("cluster", "name"), ("tracking", "name"), ("optim", "name")):
        if key == f"{group}.{name}" and not any(other.startswith(f"{group}=") for other in overrides):
            return f"{group}={value}"
    return word


def _own_experiment(word: str) -> str:
    """The word with the file that it names made known to Hydra; an experiment of conf/ stays as it is."""
    path = Path(word.partition("=")[2].strip("'\"")).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        return word
    if not path.is_file():
        raise UserError(f"{word}: there is no such file (looked in {Path.cwd()}); give a YAML file, or one of: "
                        f"{', '.join(choices('experiment'))}")
    name = f"file_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    ConfigStore.instance().store(name, experiment_file(path, word), group="experiment", package="_global_")
    _own_experiments.add(name)
    return f"experiment={name}"


_own_experiments: set[str] = set()           # what Hydra's store, of this process, has of them


def choices(group: str) -> list[str]:
    """The choices of a group, as `loss=...` takes them."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml") if not file.stem.startswith("_"))


def experiments() -> dict[str, str]:
    """{name of an experiment: what it is}, by the head of its file, which names the command that runs it."""
    heads = {name: (conf_dir() / "experiment" / f"{name}.yaml").read_text() for name in choices("experiment")}
    return {name: match[1] for name, head in heads.items()
            if (match := re.search(r"^# (.+?): dpo-dist run", head, re.M))}


def _to_plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


# ------------------------------------------------------------------------------------------------------ what went wrong


def _explain(words: Sequence[str], overrides: Sequence[Override], error: Exception) -> str:
    """The message for what Hydra refused: which override is wrong, and the nearest valid name."""
    def composes(some: Sequence[str]) -> None:
        _to_plain(_compose(with_groups(some)))

    groups = _groups()
    chosen = [o.input_line for o in overrides if o.key_or_group in groups and o.input_line]
    try:
        valid = set(_flat_keys(_to_plain(_compose(chosen))))
    except Exception:                        # as in composed: a group that is taken away, an experiment's file
        return blamed(words, composes, error)
    for override in overrides:
        if override.key_or_group not in groups and override.key_or_group not in valid:
            other = _choice_with(override.key_or_group)
            remedy = f"it goes with {other}" if other else nearest(override.key_or_group, valid)
            return f"unknown key '{override.key_or_group}': {remedy}"
    return blamed(words, composes, error)


def _choice_with(key: str) -> str | None:
    """group=choice, or several of them, whose YAML file has the key, where the chosen one does not."""
    group, _, name = key.partition(".")
    files = (conf_dir() / group / f"{choice}.yaml" for choice in choices(group))
    found = [f"{group}={file.stem}" for file in files
             if any(dotted == name or dotted.startswith(f"{name}.") for dotted, _, _ in yaml_comments(file))]
    return " or ".join(found) or None


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of each text in a plain config."""
    if isinstance(value, str):
        yield key, value
    held = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for name, inner in held.items():
        yield from _leaves(inner, f"{key}.{name}".lstrip("."))


def _flat_keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")


# ----------------------------------------------------------------------------------------------------------------- help


def documented_keys() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, from the YAML files' own comments: the default configuration's keys, then
    those that other choices of a group add."""
    out: dict[str, tuple[str, str, str]] = {}
    config = conf_dir() / "config.yaml"
    defaults = dict(re.findall(r"^  - (?:optional )?(\w+): (\w+)$", config.read_text(), re.M))
    for group, default_choice in defaults.items():
        for choice in [default_choice, *choices(group)] if default_choice != "null" else []:
            for key, default, text in yaml_comments(conf_dir() / group / f"{choice}.yaml"):
                name = f"{group}.{key}"
                out.setdefault(name, (name, default,
                                      text if choice == default_choice else f"{text} ({group}={choice})"))
    return [*out.values(), *yaml_comments(config)]


def yaml_comments(path: Path) -> list[tuple[str, str, str]]:
    """(dotted key, value as written, comment) of each leaf of a YAML file and of the files that it inherits."""
    rows: dict[str, tuple[str, str, str]] = {}
    parents: list[tuple[int, str]] = []
    last = ""
    for line in path.read_text().splitlines():
        inherited = re.match(r"^  - (\w+)$", line)
        if inherited and inherited[1] != "_self_":
            rows.update({row[0]: row for row in yaml_comments(path.parent / f"{inherited[1]}.yaml")})
        match = re.match(r"^( *(?:- )?)(\w+):(?: +([^#\s][^#]*?))?(?:\s+#\s*(.*))?$", line)
        if not match:
            further = re.match(r"^ {10,}# (.*)$", line)                  # a comment that continues on the next line
            if further and last in rows:
                rows[last] = (*rows[last][:2], f"{rows[last][2]} {further[1]}")
            continue
        indent, key, value, comment = len(match[1]), match[2], match[3], match[4] or ""
        while parents and parents[-1][0] >= indent:
            parents.pop()
        dotted = ".".join([p[1] for p in parents] + [key])
        if value is None:
            parents.append((indent, key))
            last = ""
        else:
            previous = rows.get(dotted, ("", "", ""))[2]
            rows[dotted], last = (dotted, value.strip(), previous or comment), dotted if not previous else ""
    return [row for row in rows.values() if not row[0].startswith("defaults.")]
