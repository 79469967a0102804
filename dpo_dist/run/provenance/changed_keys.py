"""Two nested mappings compared, key by key."""
from __future__ import annotations

from typing import Any


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key whose value is another, as "train.seed was 0, is now 1"."""
    return [f"{key} was {was}, is now {is_now}" for key, was, is_now in changed_keys(before, now)]


def changed_keys(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of each that differs; None for a key that is not there."""
    out: list[tuple[str, Any, Any]] = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append((f"{prefix}{key}", a, b))
    return out
