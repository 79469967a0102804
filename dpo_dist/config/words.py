"""The command line of a config: the words that compose to it, as few as there are."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_dist.config.compose import compose, composed
from dpo_dist.config.loss_options import MIXTURE
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import DatasetConfig, RunConfig

# what a config says that is no key of a command: the experiment's name, whose keys are all told by themselves
NO_KEYS = ("experiment",)
MIXTURES = ("rpo", "mpo")                    # of conf/loss/
PLAIN = re.compile(r"[A-Za-z_./-][\w./@+-]*")
NOT_PLAIN = ("null", "true", "false", "yes", "no", "on", "off", "nan", "inf", "none")
DATASET = {f.name: f.default for f in dataclasses.fields(DatasetConfig) if f.default is not dataclasses.MISSING}


def words_of(config: RunConfig) -> list[str]:
    """The words of `dpo-dist run` that give this config; compose(words_of(c)) is c again."""
    wanted, model = to_dict(config), _word("model.path", config.model.path)
    plain = composed([model])
    names = {"reference": "engine", "loss": "name", "optim": "name", "cluster": "name", "tracking": "name"}
    groups = [f"{group}={_loss(config) if group == 'loss' else wanted[group][name]}" for group, name in names.items()
              if wanted[group][name] != plain[group][name]]
    loss = [word for word in groups if word.startswith("loss=")]
    base = composed([*groups, model]) if groups else plain
    base["loss"] = to_dict(compose([*loss, model]).loss)             # with its defaults
    words = [*groups, model, *(_word(key, value) for key, value in _differences(base, wanted) if key != "model.path")]
    again = dataclasses.replace(compose(words), experiment=config.experiment)
    assert again == config, f"the words give another config: {words}"
    return words


def _loss(config: RunConfig) -> str:
    """The choice of conf/loss/ that is nearest: of mixtures, one with the same terms where there is one, else one
    without terms, which would be added to the mixture's own."""
    if config.loss.name != MIXTURE:
        return config.loss.name
    alike = (name for name in MIXTURES if composed([f"loss={name}", "model.path=m"])["loss"]["terms"]
             == config.loss.terms)
    return next(alike, "dpo")


def _differences(base: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in wanted.items():
        if not prefix and key in NO_KEYS:
            continue
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and f"{prefix}{key}" != "loss.terms":
            yield from _differences(before, value, f"{prefix}{key}.")
        elif value != before:
            yield f"{prefix}{key}", value


def _word(key: str, value: Any) -> str:
    if key in ("data.train", "data.eval"):
        value = [{name: entry for name, entry in data_set.items() if name not in DATASET or entry != DATASET[name]}
                 for data_set in value]
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    """The value as Hydra's overrides have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str) and not (PLAIN.fullmatch(value) and value.lower() not in NOT_PLAIN):
        return quoted(value)
    return str(value)


def quoted(text: str) -> str:
    """The text as the value of an override, whatever characters it has."""
    quote = "'" if "'" not in text else '"'
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)                # no interpolation
    # a backslash is one, but before a quote
    return quote + re.sub(r'(\\*)(' + quote + r'|$)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text) + quote
