"""Nulls that a table's one schema added, told from nulls that were meant, and taken out.

A table (parquet, a hub set, also JSON written from one) has one schema: an object that lacks a field which some other
object at the same place has, gets it as null. What chat templates would make of such nulls is never meant. The rule:

- Nulls in lists, and all within JSON text, are as they were written.
- Elsewhere than in a tool call's arguments and in tool schemas, a null says no more than an absent field: taken out.
- In schemas only `default`, `const` and `example` can be null; in arguments only what the tool that is called lists
  among its parameters (anything, where its schema is not at hand). Any other null there is padding.
- Of those that remain, a JSON file tells by its objects within messages and tools. Where two at the same place differ
  in their fields, no table wrote the file, and each null is meant. Where all agree, a null is meant if nothing but null
  ever stands at its place, for then no table had a reason to add it.
- Where that is no help, and in parquet and hub sets, an argument's null stays if its parameter is required and may be
  null, as in strict schemas: the call would not be valid without it.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

NULLABLE_KEYWORDS = ("default", "const", "example")
Place = tuple[str, ...]                      # the keys on the way to a value; lists add none


@dataclass(frozen=True)
class Evidence:
    """What a file says of where its nulls come from."""

    a_table: bool                            # a table may have written it
    never_null: frozenset[Place] = frozenset()                       # places where something else than null stands

    def meant(self, place: Place) -> bool:
        return not self.a_table or place not in self.never_null


def evidence_of(records: Iterable[Any]) -> Evidence:
    """Looks at a file's records until two objects at the same place differ in their fields, or at all of them."""
    fields_at: dict[Place, set[str]] = {}
    never_null: set[Place] = set()

    def agrees(value: Any, place: Place, inside: bool) -> bool:
        if isinstance(value, list):
            return all(agrees(inner, place, inside) for inner in value)
        if not isinstance(value, dict):
            return True
        inside = inside or "role" in value
        if inside and fields_at.setdefault(place, {*value}) != value.keys():
            return False
        for key, inner in value.items():
            if inner is not None:
                if inside:
                    never_null.add((*place, key))
                if not agrees(inner, (*place, key), inside or key == "tools"):
                    return False
        return True

    if all(agrees(record, (), False) for record in records):
        return Evidence(True, frozenset(never_null))
    return Evidence(False)


class Padding:
    """Takes the nulls out of a file's records. `look` gives the file's records again, where it is JSON: its evidence is
    asked for at the first null that depends on it, which few files have."""

    def __init__(self, look: Callable[[], Iterable[Any]] | None):
        self.look = look
        self.evidence: Evidence | None = None

    def without(self, record: Any) -> Any:
        """The record without the nulls that are padding. Nothing else of it changes."""
        return _Cleaner(record, self).clean(record, ())

    def meant(self, place: Place) -> bool:
        if self.look is None:
            return False
        if self.evidence is None:
            self.evidence = evidence_of(self.look())
        return self.evidence.meant(place)


class _Cleaner:
    """One record's way through the rule above."""

    def __init__(self, record: Any, padding: Padding):
        self.record, self.padding = record, padding
        self.schemas: dict[str, dict[str, Any]] | None = None        # of the record's tools, once asked for

    def clean(self, value: Any, place: Place) -> Any:
        if isinstance(value, list):
            return [self.clean(inner, place) if isinstance(inner, dict | list) else inner for inner in value]
        if not isinstance(value, dict):
            return value
        out = {}
        for key, inner in value.items():
            if isinstance(inner, dict | list):
                if key == "arguments" and "name" in value:
                    out[key] = self.arguments(inner, (*place, key), value["name"])
                elif key == "tools":
                    out[key] = self.schema(inner, (*place, key))
                else:
                    out[key] = self.clean(inner, (*place, key))
            elif inner is not None:
                out[key] = inner
        return out

    def arguments(self, value: Any, place: Place, tool: str | None) -> Any:
        """tool: the one that is called, where `value` is its arguments; None deeper inside."""
        if isinstance(value, list):
            return [self.arguments(inner, place, None) for inner in value]
        if not isinstance(value, dict):
            return value
        return {key: self.arguments(inner, (*place, key), None) for key, inner in value.items()
                if inner is not None or self.argument_is_meant((*place, key), tool)}

    def argument_is_meant(self, place: Place, tool: str | None) -> bool:
        schema = self.schema_of(tool) if isinstance(tool, str) else None
        if schema is None:
            return self.padding.meant(place)
        parameters = schema.get("properties")
        parameter = parameters.get(place[-1]) if isinstance(parameters, dict) else None
        if not isinstance(parameter, dict):
            return False
        required = schema.get("required")
        must_be_there = isinstance(required, list) and place[-1] in required and _may_be_null(parameter)
        return must_be_there or self.padding.meant(place)

    def schema(self, value: Any, place: Place, names: bool = False) -> Any:
        """names: the keys of `value` are names of parameters, not words of JSON Schema."""
        if isinstance(value, list):
            return [self.schema(inner, place) if isinstance(inner, dict | list) else inner for inner in value]
        out = {}
        for key, inner in value.items():
            if isinstance(inner, dict | list):
                cleaned = self.schema(inner, (*place, key), names=key == "properties" and not names)
                if cleaned or not inner or not names:                # a parameter with nothing but nulls is padding
                    out[key] = cleaned
            elif inner is not None or (not names and key in NULLABLE_KEYWORDS and self.padding.meant((*place, key))):
                out[key] = inner
        return out

    def schema_of(self, tool: str) -> dict[str, Any] | None:
        if self.schemas is None:
            self.schemas = dict(_schemas(self.record))
        return self.schemas.get(tool)


def _schemas(record: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, schema of the parameters) of the tools that a record gives, at its top or a level below (input.tools)."""
    inner = [value for value in record.values() if isinstance(value, dict)] if isinstance(record, dict) else []
    for holder in [record, *inner]:
        for tool in _parsed(holder.get("tools") if isinstance(holder, dict) else None, list):
            tool = _parsed(tool, dict)
            function = tool.get("function", tool)
            if isinstance(function, dict) and isinstance(function.get("name"), str) and "parameters" in function:
                yield function["name"], _parsed(function.get("parameters"), dict)


def _parsed(value: Any, kind: type) -> Any:
    """A list or object, given as such or as JSON text; an empty one for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
    return value if isinstance(value, kind) else kind()


def _may_be_null(parameter: dict[str, Any]) -> bool:
    kinds = parameter.get("type")
    if kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or parameter.get("nullable") is True:
        return True
    lists = {word: parameter[word] for word in ("enum", "anyOf", "oneOf") if isinstance(parameter.get(word), list)}
    return None in lists.pop("enum", []) or any(
        isinstance(variant, dict) and _may_be_null(variant) for variants in lists.values() for variant in variants)
