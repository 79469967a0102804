"""A finding of `verify`: one line about one thing that a run's numbers come from."""
from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, Literal

Status = Literal["same", "harmless", "told", "changed", "missing"]
# the numbers no longer come from this; of the others "harmless" is a change without an effect on them, and "told" one
# whose effect no digest can say
FAILS: tuple[Status, ...] = ("changed", "missing")
SHOWN = 3                                    # examples of what changed
CONTEXT = 24                                 # characters around a change


@dataclass(frozen=True)
class Finding:
    status: Status
    what: str                                # a config key, or one of the parts of run.json
    says: str
    means: str = ""                          # for the numbers; empty where it is the same
    details: dict[str, Any] = field(default_factory=dict)        # JSON-ready, for programs

    @property
    def fails(self) -> bool:
        return self.status in FAILS

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """For a person: a line for each, and under it what it means."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        yield f"{finding.status:<9} {finding.what:<{width}}  {finding.says}"
        if finding.means:
            yield f"{'':<9} {'':<{width}}  → {finding.means}"


def examples(names: Sequence[str], total: int | None = None) -> str:
    """The first few, and how many more there are."""
    more = (len(names) if total is None else total) - min(SHOWN, len(names))
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more else "")


def text_change(before: str, now: str) -> str:
    """Where two texts first differ, and how they go on there."""
    at = next((i for i, (a, b) in enumerate(zip_longest(before, now)) if a != b), 0)
    line = before.count("\n", 0, at) + 1
    byte = len(before[:at].encode("utf-8", "surrogatepass"))
    start = max(0, at - CONTEXT)
    return (f"from byte {byte} (line {line}) on: was {before[start:at + CONTEXT]!r}, is now "
            f"{now[start:at + CONTEXT]!r}{_how_many(before, now)}")


def _how_many(before: str, now: str) -> str:
    changed = sum(line[:1] in "+-" for line in difflib.ndiff(before.splitlines(), now.splitlines()))
    return f" ({changed} lines differ)" if changed > 2 else ""


def value_changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Of two JSON values: where they differ, as "model.vocab.a was 5, is now 6"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in before or key not in now:
                yield f"{path}{key} is {'gone' if key in before else 'new'}"
            else:
                yield from value_changes(before[key], now[key], f"{path}{key}.")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for at, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from value_changes(a, b, f"{path}{at}.")
    elif before != now:
        yield f"{path.rstrip('.')} was {_short(before)}, is now {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 2 * CONTEXT else f"{text[:2 * CONTEXT]}…"
