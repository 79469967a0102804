"""What a check found."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What is there, in one line; where it would stop a run, what to do about it."""

    text: str
    remedy: str | None = None

    @property
    def ok(self) -> bool:
        return self.remedy is None


def together(findings: Sequence[Finding]) -> Finding:
    """One finding: all that is wrong with all remedies, or, where nothing is, all that was said."""
    red = [f for f in findings if not f.ok]
    if red:
        return Finding("; ".join(f.text for f in red), "; ".join(dict.fromkeys(f.remedy for f in red if f.remedy)))
    return Finding("; ".join(f.text for f in findings))
