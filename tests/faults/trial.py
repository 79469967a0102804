"""One trial: a folder of its own, the command that is given again and again, and what became of each start."""
from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import bases, commands
from .bases import Base
from .commands import Attempt
from .results import Results


@dataclass
class Trial:
    kind: str
    seed: int
    number: int
    base: Base
    work: Path
    random: random.Random
    told: list[str] = field(default_factory=list)            # what was done, for the report
    attempts: list[Attempt] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)      # takes the fault away, newest first
    afterwards: list[Callable[[], None]] = field(default_factory=list)        # when it is judged
    more: list[str] = field(default_factory=list)            # words in place of those of the same keys, or beside them
    to_rounding: bool = False                                # another number of ranks adds in another order

    @property
    def run(self) -> Path:
        return self.work / "run"

    @property
    def words(self) -> list[str]:
        return self.with_words()

    def with_words(self, *more: str) -> list[str]:
        """The command, with these words in place of those of the same keys."""
        more = (*self.more, *more)
        keys = {word.partition("=")[0] for word in more if "=" in word}
        return [*(word for word in bases.words(self.base.name) if word.partition("=")[0] not in keys), *more]

    def tell(self, what: str) -> None:
        self.told.append(what)

    def begin(self, *states: str) -> str:
        """Fills the folder as one of these states has it; which."""
        state = self.random.choice(states)
        self.tell(f"{self.base.name}, {state}")
        self.base.copy(state, self.work)
        return state

    def start(self, *more: str) -> Any:
        return commands.start(self.with_words(*more), self.work, self.environment)

    def again(self, *more: str, limit: float = commands.LIMIT_SECONDS) -> Attempt:
        """The command once more, to its end."""
        began = time.monotonic()
        return self.note(commands.finish(self.start(*more), self.work, began, limit))

    def note(self, attempt: Attempt) -> Attempt:
        self.attempts.append(attempt)
        return attempt

    def end(self) -> None:
        self.mend()
        while self.afterwards:
            self.afterwards.pop()()

    def mend(self) -> None:
        while self.undo:
            self.undo.pop()()

    def differences(self, run: Path | None = None) -> list[str]:
        """What the run has otherwise than the undisturbed one; empty: recovered."""
        run = run or self.run
        try:
            found = self.base.results.differences(Results.of(run), self.to_rounding)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"{type(error).__name__}: {error}"]
        return found + ([] if (run / "DONE").exists() else ["no DONE"])
