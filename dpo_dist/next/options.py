"""The keys of `dpo-dist next`, and what they mean. No torch here."""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.secrets import refuse_secret_words

MOST_DROPPED = 0.1                           # share of the pairs that drop_suspects=auto leaves out, at most
HELP = f"""dpo-dist next RUN [next.KEY=VALUE ...]: writes the next round's rows and prints its command

  next.to=RUN/next/rows.jsonl   the file of the rows (of further data sets: rows-2.jsonl, ...). Beside it:
                                dropped.jsonl, the suspects that were left out; held_out.jsonl, where
                                data.eval_fraction held some out
  next.drop_suspects=auto       share of the pairs to leave out, the most suspicious first, from 0 to 0.5; auto = as
                                many as are flipped by the run's estimate, {MOST_DROPPED:.0%} at most; 0 = none
  next.answers=0                answers that the trained model gives to each training prompt, 2 or more; the judge's
                                scores make them rows of the format ratings, in answers.jsonl; 0 = none
  next.judge=none               what scores an answer: an address (http://...), or a program and its arguments, as in
                                next.judge='python judge.py'. It gets {{id, prompt, answer}} and gives {{id, score}}:
                                a program as JSON lines, an address as a POST of {{"rows": [...]}}
  next.timeout_seconds=600      the longest wait for the judge's next answer
  next.temperature=0.8          of the model's answers, above 0
  next.max_new_tokens=256       tokens of an answer, at most; answers that are cut there are left out
  next.seed=0                   of what is drawn

It reads run.json, suspects.jsonl, the files of data.train and, for answers, the model, and changes none of them. The
same command goes on with answers where it stopped.
"""


@dataclass(frozen=True)
class Options:
    """As in HELP, without `next.`"""

    to: str | None = None
    drop_suspects: float | None = None       # None: auto
    answers: int = 0
    judge: str | None = None
    timeout_seconds: float = 600.0
    temperature: float = 0.8
    max_new_tokens: int = 256
    seed: int = 0

    @property
    def judge_url(self) -> str | None:
        return self.judge if self.judge and self.judge.startswith(("http://", "https://")) else None

    @property
    def judge_command(self) -> tuple[str, ...] | None:
        """Also where it is written as a list, as in eval.judge.command=[python,judge.py]."""
        if not self.judge or self.judge_url is not None:
            return None
        if self.judge.startswith("[") and self.judge.endswith("]"):
            return tuple(word.strip(" '\"") for word in self.judge[1:-1].split(","))
        return tuple(shlex.split(self.judge))

    @staticmethod
    def of(words: Sequence[str]) -> Options:
        """UserError naming key, value and remedy."""
        refuse_secret_words(words)
        values: dict[str, Any] = {}
        known = {f"next.{f.name}": f.name for f in fields(Options)}
        for word in words:
            key, _, value = word.partition("=")
            if key not in known or not value:
                raise UserError(f"unknown word '{word}': {nearest(key, known)}; see dpo-dist next --help")
            values[known[key]] = _read(known[key], value)
        options = Options(**values)
        options.check(set(values))
        return options

    def check(self, given: set[str]) -> None:
        """UserError for keys that contradict each other, or would do nothing."""
        if self.answers and self.judge is None:
            raise UserError(f"next.answers={self.answers} needs what scores them; set next.judge='python judge.py', or "
                            "an address")
        if self.answers == 1:
            raise UserError("next.answers=1 makes no pair; set next.answers=4")
        idle = sorted(given & {"judge", "timeout_seconds", "temperature", "max_new_tokens", "seed"})
        if not self.answers and idle:
            raise UserError(f"next.{idle[0]} does nothing without answers; set next.answers=4, or remove it")


# {key: (kind, least, most, in words)}
RANGES: dict[str, tuple[type, float, float, str]] = {
    "drop_suspects": (float, 0, 0.5, "auto, or a share from 0 to 0.5"),
    "answers": (int, 0, 1000, "a whole number, 0 or from 2 on"),
    "timeout_seconds": (float, 1e-3, float("inf"), "a number above 0"),
    "temperature": (float, 1e-6, float("inf"), "a number above 0"),
    "max_new_tokens": (int, 1, float("inf"), "a whole number, 1 or more"),
    "seed": (int, 0, float("inf"), "a whole number, 0 or more")}


def _read(name: str, value: str) -> Any:
    if name not in RANGES:
        return None if name == "judge" and value == "none" else value
    if name == "drop_suspects" and value == "auto":
        return None
    kind, least, most, words = RANGES[name]
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise UserError(f"next.{name}={value} must be {words}")
    return number
