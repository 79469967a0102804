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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_dist.config.decode import decode
from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.loss_options import MIXTURE
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
    """The validated RunConfig of `key=value` overrides. Raises UserError for anything a person can mend."""
    return decode(composed(overrides))


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The same before it is decoded, when keys may still contradict each other. Raises UserError for unknown ones."""
    refuse_secret_words(overrides)
    try:
        return _to_plain(_compose(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(overrides, error)) from error


def _compose(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra_compose(config_name="config", overrides=with_groups(overrides))


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
    ConfigStore.instance().store(name, OmegaConf.load(path), group="experiment", package="_global_")
    return f"experiment={name}"


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


def explain(overrides: Sequence[str], error: Exception) -> str:
    """The message for what Hydra refused: which override is wrong, and the nearest valid name."""
    groups = {folder.name: choices(folder.name) for folder in conf_dir().iterdir() if folder.is_dir()}
    parsed: list[Override] = []
    for text in with_groups(overrides):
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException:
            return (f"cannot read the override '{text}': write key=value, and quote values with special characters, "
                    "as in 'data.train=[{path: rows.jsonl, format: preference}]'")
    for override in parsed:
        if override.key_or_group in groups and isinstance(override.value(), str):
            choice = str(override.value())
            if override.key_or_group == "loss" and choice == MIXTURE:
                return (f"loss={MIXTURE} is not a choice: loss=rpo and loss=mpo are mixtures; for one of your own set "
                        f"loss.name={MIXTURE} and loss.terms={{sigmoid: 1.0, sft: 0.5}}")
            if choice not in groups[override.key_or_group]:
                return (f"{override.key_or_group}={choice} is not a choice: "
                        f"{nearest(choice, groups[override.key_or_group])}")
    chosen = [o.input_line for o in parsed if o.key_or_group in groups and o.input_line]
    valid = set(_flat_keys(_to_plain(_compose(chosen))))
    for override in parsed:
        if override.key_or_group not in groups and override.key_or_group not in valid:
            other = _choice_with(override.key_or_group)
            remedy = f"it goes with {other}" if other else nearest(override.key_or_group, valid)
            return f"unknown key '{override.key_or_group}': {remedy}"
    return str(error).splitlines()[0]


def _choice_with(key: str) -> str | None:
    """group=choice, or several of them, whose YAML file has the key, where the chosen one does not."""
    group, _, name = key.partition(".")
    files = (conf_dir() / group / f"{choice}.yaml" for choice in choices(group))
    found = [f"{group}={file.stem}" for file in files
             if any(dotted == name or dotted.startswith(f"{name}.") for dotted, _, _ in yaml_comments(file))]
    return " or ".join(found) or None


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
