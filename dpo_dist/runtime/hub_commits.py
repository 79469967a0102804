"""Which commit of the hub each name stands for: one for as long as a process lives, and one for a run, however often
it is begun. A branch that moves meanwhile moves no run. No torch here."""
from __future__ import annotations

from collections.abc import Mapping

_commits: dict[str, str] = {}              # {owner/model, owner/model@branch, datasets/owner/set: commit}


def pin(commits: Mapping[str, str]) -> None:
    """From here on these names stand for these commits: those of the run that goes on (RunDir.hub_commits)."""
    _commits.update(commits)


def commit_of(name: str) -> str | None:
    """What the name stands for; None where it was not asked for yet."""
    return _commits.get(name)


def note(name: str, commit: str) -> None:
    """Keeps what the name stood for when it was loaded."""
    _commits.setdefault(name, commit)


def commits() -> dict[str, str]:
    """{name: commit} of all that this process has taken from the hub, or from its local cache, and what it was told."""
    return dict(sorted(_commits.items()))
