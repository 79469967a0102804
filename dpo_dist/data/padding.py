"""Nulls that a table's one schema added, told from nulls that were meant, and taken out.

A table (parquet, a hub set, also JSON and CSV written from one) has one schema: an object that lacks a field which some
other object at the same place has, gets it as null. What chat templates would make of such nulls is never meant. The
rule:

- Nulls in lists, and all within JSON text, are as they were written. (A CSV's chats and tools are read before.)
- Elsewhere than in a tool call's arguments and in tool schemas, a null says no more than an absent field: taken out. In
  schemas only `default`, `const` and `example` can be null; any other null there is taken out as well.
- Of those that remain, a JSON file tells by its objects within messages and tools. Where nothing but null ever stands
  at a place, no table had a reason to add it: it is meant. Where two objects at one place differ in their fields, no
  table wrote the file: nulls are meant, but for arguments that the called tool does not list among its parameters.
- Where that is no help, and in parquet and hub sets, an argument's null stays if its parameter is required and may be
  null, as in strict schemas: the call would not be valid without it.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

NULLABLE_KEYWORDS = ("default", "const", "example")
Place = tuple[str, ...]                      # the keys on the way to a value; lists add none


class Evidence:
    """What a file says of where its nulls come from. `look` gives its records again: they are asked for at the first
    null that depends on them, which few files have."""

    def __init__(self, look: Callable[[], Iterable[Any]]):
        self.look = look

    @cached_property
    def a_table(self) -> bool:
        """Whether a table may have written the file: all objects at one place have the same fields. Looks until two
        differ."""
        fields_at: dict[Place, set[str]] = {}
        return all(fields_at.setdefault(place, {*value}) == value.keys()
                   for record in self.look() for place, value in _objects(record, (), False))

    @cached_property
    def never_null(self) -> frozenset[Place]:
        """The places at which something else than null stands. Looks at the whole file."""
        return frozenset((*place, key) for record in self.look() for place, value in _objects(record, (), False)
                         for key, inner in value.items() if inner is not None)


def _objects(value: Any, place: Place, inside: bool) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The objects that messages and tools consist of, each with its place. inside: whether `value` is part of one."""
    if isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict | list):
                yield from _objects(inner, place, inside)
    elif isinstance(value, dict):
        inside = inside or "role" in value
        if inside:
            yield place, value
        for key, inner in value.items():
            if isinstance(inner, dict | list):
                yield from _objects(inner, (*place, key), inside or key == "tools")


class Padding:
    """Takes the nulls out of a file's records. `look` gives its records again, where it is JSON; None: a table."""

    def __init__(self, look: Callable[[], Iterable[Any]] | None):
        self.evidence = look and Evidence(look)

    def without(self, record: Any) -> Any:
        """The record without the nulls that are padding. Nothing else of it changes."""
        return _Cleaner(record, self.evidence).clean(record, ())


class _Cleaner:
    """One record's way through the rule above."""

    def __init__(self, record: Any, evidence: Evidence | None):
        self.record, self.evidence = record, evidence

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
        schema = self.schemas.get(tool) if isinstance(tool, str) else None
        if schema is None:
            return self.is_meant(place)
        name, parameter = place[-1], _parameters(schema).get(place[-1])
        if not isinstance(parameter, dict):
            other_tools = any(name in _parameters(other) for other in self.schemas.values())
            return not other_tools and self.is_meant(place, likely=False)
        required = schema.get("required")
        return self.is_meant(place) or (isinstance(required, list) and name in required and _may_be_null(parameter))

    def is_meant(self, place: Place, likely: bool = True) -> bool:
        """What the file says. likely: whether a null makes sense there."""
        if self.evidence is None:
            return False
        return (likely and not self.evidence.a_table) or place not in self.evidence.never_null

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
            elif inner is not None or (not names and key in NULLABLE_KEYWORDS and self.is_meant((*place, key))):
                out[key] = inner
        return out

    @cached_property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """{name: schema of the parameters} of the record's tools."""
        return dict(_schemas(self.record))


def _schemas(record: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, schema of the parameters) of the tools that a record gives, at its top or a level below (input.tools)."""
    inner = [value for value in record.values() if isinstance(value, dict)] if isinstance(record, dict) else []
    for holder in [record, *inner]:
        for tool in _parsed(holder.get("tools") if isinstance(holder, dict) else None, list):
            tool = _parsed(tool, dict)
            function = tool.get("function", tool)
            if isinstance(function, dict) and isinstance(function.get("name"), str) and "parameters" in function:
                yield function["name"], _parsed(function.get("parameters"), dict)


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _parsed(value: Any, kind: type) -> Any:
    """A list or object, given as such or as JSON text; an empty one for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value if isinstance(value, kind) else kind()


def _may_be_null(parameter: dict[str, Any]) -> bool:
    kinds = parameter.get("type")
    if kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or parameter.get("nullable") is True:
        return True
    lists = {word: parameter[word] for word in ("enum", "anyOf", "oneOf") if isinstance(parameter.get(word), list)}
    return None in lists.pop("enum", []) or any(
        isinstance(variant, dict) and _may_be_null(variant) for variants in lists.values() for variant in variants)
