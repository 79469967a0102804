"""What is said to a person whose input is wrong."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that a person can fix. The message names key, value and remedy; the command exits with code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """did you mean 'X'?, with the closest valid name; or the list of all valid names where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(names)}"
