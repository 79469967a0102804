"""What is said to a person whose input is wrong."""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 2_000                        # characters of a message that may quote what a person gave


class UserError(ValueError):
    """A mistake that a person can fix. The message names key, value and remedy; the command exits with code 2."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def nearest(name: str, valid: Iterable[str]) -> str:
    """did you mean 'X'?, with the closest valid name; or the list of all valid names where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(names)}"


def printable(text: str) -> str:
    """The text as every file and terminal takes it: halves of surrogate pairs, which file names and JSON may hold, are
    written as Python writes them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """The text on one line, without its middle where it is very long, whatever it quotes: control characters and halves
    of surrogate pairs are written as Python writes them."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST // 2]} ... {text[-LONGEST // 2:]}"
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)
