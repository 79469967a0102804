"""A plain nested mapping → the RunConfig that it describes, checked key by key. No torch here."""
from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dpo_dist.config.cluster import CLUSTERS, ClusterConfig
from dpo_dist.config.engines import ENGINES
from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.optimizers import OPTIMIZERS
from dpo_dist.config.reference import ReferenceConfig
from dpo_dist.config.rules import resolve_loss, validate
from dpo_dist.config.schema import DatasetConfig, OptimConfig, RunConfig
from dpo_dist.config.secrets import refuse_secrets
from dpo_dist.config.tracking import TRACKERS, TrackingConfig

# Sections with variants, each with keys of its own: (the key that names the variant, {name: variant}).
VARIANTS: dict[Any, tuple[str, Mapping[str, Any]]] = {
    ReferenceConfig: ("engine", ENGINES), ClusterConfig: ("name", CLUSTERS), TrackingConfig: ("name", TRACKERS),
    OptimConfig: ("name", OPTIMIZERS)}
DEEPEST = 30                               # values inside values
ALIASES = {"float32": "fp32", "bfloat16": "bf16"}


def decode(raw: Mapping[str, Any]) -> RunConfig:
    """The RunConfig that a plain nested mapping describes. Raises UserError naming key, value and remedy."""
    refuse_secrets("", raw)                              # first: what is wrong with a value may show it
    _check_values(raw, "")
    config = _decode(RunConfig, raw, "")
    config = dataclasses.replace(config, loss=resolve_loss(config.loss))
    validate(config)
    return config


def _check_values(value: Any, key: str, depth: int = 0) -> None:
    """UserError for what no key takes, wherever it stands: what files and libraries cannot hold."""
    if depth > DEEPEST:
        raise UserError(f"{key} is nested more than {DEEPEST} deep; nothing here is")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_values(str(name), key)
            _check_values(inner, f"{key}.{name}".lstrip("."), depth + 1)
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            _check_values(inner, f"{key}[{at}]", depth + 1)
    elif isinstance(value, str):
        if found := re.search(r"[\0\ud800-\udfff]", value):
            raise UserError(f"{key}={value!r} holds {found[0]!r}, which no text may; remove it")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} must be a finite number; give one, or null where a key takes it")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{key}={'-' * (value < 0)}10^{value.bit_length() * math.log10(2):.0f} has more than the 64 "
                        "bits of a whole number; give a smaller one")
    elif not isinstance(value, int | float | None):
        raise UserError(f"{key} is {type(value).__name__}, which no key takes; give a text, a number, true or false")


def _decode(kind: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {str(k): _decode(Any, v, key) for k, v in value.items()} if isinstance(value, Mapping) else value
    if kind in VARIANTS:
        return _decode_variant(kind, value, key)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode_one_of([a for a in args if a is not type(None)], value, key)
    if origin is Literal:
        value = ALIASES.get(value, value) if isinstance(value, str) else value
        value = "off" if value is False and "off" in args else value         # YAML reads the word off as false
        if value not in args or isinstance(value, bool):
            raise UserError(f"{key}={value!r} is not allowed: {nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if args[0] is DatasetConfig and isinstance(value, str | Mapping):
            value = [value]                              # data.train=pairs.jsonl
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}={value!r} must be a list, as in {key}=[...]")
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inner) != len(value):
            raise UserError(f"{key}={value!r} must have {len(inner)} entries")
        return tuple(_decode(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{key}={value!r} must be a mapping, as in {key}={{name: value}}")
        return {str(k): _decode(args[1], v, f"{key}.{k}") for k, v in value.items()}
    return _decode_scalar(kind, value, key)


def _decode_one_of(kinds: list[Any], value: Any, key: str) -> Any:
    """The value as the first of these kinds that it fits. Where none fits: the last kind's error, or one that lists
    them all."""
    for kind in kinds:
        try:
            return _decode(kind, value, key)
        except UserError as error:
            refused = error
    if all(typing.get_origin(kind) is Literal or kind in _TYPE_NAMES for kind in kinds[:-1]) and len(kinds) > 1:
        words = [word for kind in kinds for word in (typing.get_args(kind) or (_TYPE_NAMES[kind],))]
        raise UserError(f"{key}={value!r} is not allowed: one of {', '.join(words)}")
    raise refused


def _decode_variant(section: Any, value: Any, key: str) -> Any:
    """The section as the variant that its own key names."""
    names, variants = VARIANTS[section]
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r} must be a mapping; choose one of: "
                        f"{', '.join(f'{key}={name}' for name in variants)}")
    chosen = str(value.get(names))
    if chosen not in variants:
        raise UserError(f"{key}.{names}={chosen!r} is not allowed: {nearest(chosen, variants)}")
    for name in value:
        known = [other for other, kind in variants.items() if name in {f.name for f in dataclasses.fields(kind)}]
        if known and chosen not in known:
            raise UserError(f"unknown key '{key}.{name}': it goes with "
                            f"{' or '.join(f'{key}={other}' for other in known)}")
    try:
        return _decode_dataclass(variants[chosen], value, key)
    except UserError as error:
        others = [other for other in variants
                  if other != chosen and _refused_alone(variants[chosen], variants[other], value)]
        if others:
            raise UserError(f"{error} with {key}={chosen}; it goes with "
                            f"{' or '.join(f'{key}={other}' for other in others)}") from error
        raise


def _refused_alone(chosen: Any, other: Any, value: Mapping[str, Any]) -> bool:
    """Whether some key's value is one of the words that the other variant allows, and the chosen one does not."""
    ours, theirs = typing.get_type_hints(chosen), typing.get_type_hints(other)
    return any(isinstance(value[name], str) and value[name] not in typing.get_args(ours[name])
               and value[name] in typing.get_args(theirs.get(name)) for name in value if name in ours)


def _decode_dataclass(kind: Any, value: Any, key: str) -> Any:
    if kind is DatasetConfig and isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r} must be a mapping with keys "
                        f"{', '.join(f.name for f in dataclasses.fields(kind))}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in known:
            raise UserError(f"unknown key '{prefix}{name}': {nearest(str(name), known)}")
    out = {}
    for name, spec in known.items():
        if name in value:
            out[name] = _in_range(spec, _decode(hints[name], value[name], prefix + name), prefix + name)
            if out[name] == "":
                raise UserError(f"{prefix}{name} is empty; give a text, or leave it out")
        elif spec.default is dataclasses.MISSING:
            raise UserError(f"{prefix}{name} is missing; set {prefix}{name}=...")
    return kind(**out)


def _in_range(spec: dataclasses.Field[Any], value: Any, key: str) -> Any:
    """The value, where it is in the range that its field declares. What is not a number is in every range."""
    above, between = spec.metadata["above"], spec.metadata["between"]
    if isinstance(value, int | float):
        if above is not None and not value > above:
            raise UserError(f"{key}={value} must be greater than {above}")
        if between is not None and not between[0] <= value <= between[1]:
            raise UserError(f"{key}={value} must be between {between[0]} and {between[1]}")
    return value


def _decode_scalar(kind: type, value: Any, key: str) -> Any:
    if value is None or value == "???":                  # ??? is what Hydra shows for a value that must be given
        raise UserError(f"{key} is not set; set {key}=...")
    # YAML reads 5e-7 as a string
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
        else:
            _check_values(value, key)                    # text may say nan
            return value
    if kind is int and isinstance(value, float) and value.is_integer():
        _check_values(int(value), key)
        return int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)                                # a path such as 2024
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{key}={value!r} must be {_TYPE_NAMES[kind]}")
    return value


_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
