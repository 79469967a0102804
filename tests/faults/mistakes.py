"""What people get wrong: rows and overrides."""
from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable

from .bases import FRESH, MIDWAY
from .trial import Trial
from .verdict import RECOVERED, SILENT, Verdict, after_a_stop, given_once, hung

Line = dict[str, object]
TOO_LONG = "an answer of 100,000 ids"


def broken_row(trial: Trial) -> Verdict:
    """One row is broken, before the first start or between two; then it is mended."""
    state = trial.begin(FRESH, MIDWAY)
    name = trial.random.choice(("rows.jsonl", "rows.jsonl", "held_out.jsonl"))
    file, original = trial.work / name, trial.base.folder / state / name
    lines = file.read_bytes().split(b"\n")
    at, how = trial.random.randrange(len(lines) - 1), trial.random.choice(list(BROKEN))
    lines[at] = BROKEN[how](lines[at], trial.random)
    file.write_bytes(b"\n".join(lines))
    trial.tell(f"{how} in line {at + 1} of {name}")
    trial.undo.append(lambda: _copy(original, file))
    return _left_out_and_told(trial) if how == TOO_LONG else given_once(trial)


def _left_out_and_told(trial: Trial) -> Verdict:
    """Of a row that is none of the broken: it is left out, and the results are another run's."""
    first = trial.again()
    if first.hung or first.code:
        return hung(trial) if first.hung else after_a_stop(trial)
    return Verdict(RECOVERED if first.said("dropped: 1 × longer than data.max_length") else SILENT,
                   "the row is left out")


def _copy(source: object, target: object) -> None:
    shutil.copy2(str(source), str(target))


def _with(**values: object) -> Callable[[bytes, random.Random], bytes]:
    return lambda line, draw: json.dumps({**json.loads(line), **values}).encode()


def _without(key: str) -> Callable[[bytes, random.Random], bytes]:
    def change(line: bytes, draw: random.Random) -> bytes:
        row = json.loads(line)
        del row[key]
        return json.dumps(row).encode()
    return change


def _cut(line: bytes, draw: random.Random) -> bytes:
    return line[:draw.randint(1, len(line) - 1)]


def _byte(line: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(line))
    return line[:at] + draw.choice((b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80")) + line[at:]


BROKEN: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "half a line": _cut,
    "a byte that is no text": _byte,
    "words": lambda line, draw: b"no row",
    "a list": lambda line, draw: b"[1, 2, 3]",
    "a number": lambda line, draw: b"7",
    "null": lambda line, draw: b"null",
    "an empty object": lambda line, draw: b"{}",
    "a deep list": lambda line, draw: b"[" * 100_000,
    "a prompt that is deep": lambda line, draw: b'{"prompt_ids": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "two rows in a line": lambda line, draw: line + b" " + line,
    "no prompt": _without("prompt_ids"),
    "no chosen": _without("chosen_ids"),
    "no rejected": _without("rejected_ids"),
    "an empty prompt": _with(prompt_ids=[]),
    "an empty answer": _with(chosen_ids=[]),
    "null for ids": _with(rejected_ids=None),
    "text for ids": _with(chosen_ids="5 6 7"),
    "texts for ids": _with(chosen_ids=["5", "6"]),
    "fractions for ids": _with(chosen_ids=[5.5, 6.0]),
    "infinity for an id": _with(chosen_ids=[float("inf")]),
    "truth for ids": _with(prompt_ids=True),
    "lists for ids": _with(prompt_ids=[[5], [6]]),
    "a negative id": _with(prompt_ids=[-3, 5]),
    "an id outside the vocabulary": _with(rejected_ids=[64, 5]),
    "a huge id": _with(rejected_ids=[2**31]),
    "an id of seventy bits": _with(rejected_ids=[2**70]),
    TOO_LONG: _with(rejected_ids=[5] * 100_000)}


def broken_override(trial: Trial) -> Verdict:
    """The command is given with a mistake in it, then as it should be."""
    trial.begin(MIDWAY)
    word = trial.random.choice(MISTAKES) if trial.random.random() < 0.7 else _mistyped(trial)
    trial.tell(f"with {word!r}")
    trial.more.append(word)
    trial.undo.append(trial.more.clear)
    return given_once(trial)


# of these words any other may be right as well
MAY_CHANGE = ("run.dir", "train.eval_every_steps", "cluster.procs_per_node", "zero", "train")


def _mistyped(trial: Trial) -> str:
    """A word of the command with a letter taken out, exchanged, or put in."""
    words = [word for word in trial.words if word.partition("=")[0] not in MAY_CHANGE]
    word, draw = trial.random.choice(words), trial.random
    at, letter = draw.randrange(len(word)), draw.choice("abz019=.,[]{}:'\"\\$~+-é\n ")
    return draw.choice((word[:at] + word[at + 1:], word[:at] + letter + word[at + 1:], word[:at] + letter + word[at:]))


MISTAKES = (
    "zero=true", "data=null", "tracking=1e309", "experiment={a: b}", "tracking=1,2,3", "optim.lr=-1", "optim.lr=nan",
    "optim.lr=[1,2]", "optim.lr=", "train.pairs_per_step=0", "train.pairs_per_step=1e99", "model.dtype=fp33",
    "model.path=nowhere", "model.path=[]", "model.path=rows.jsonl", "loss.name=nothing", "loss.beta=${nope:1}",
    "data.train=7", "data.train=[{path: }]", "data.train=[{path: nowhere.jsonl}]", "data.train=[{}]",
    "cluster.procs_per_node=0", "cluster.procs_per_node=-1", "cluster.timeout_seconds=0", "train.max_steps=1.5",
    "train.max_steps=${oc.env:NOT_SET}", "train.max_steps=${train.max_steps}", "train.seed=1e400", "train.epochs=-1",
    "nonsense", "=", "a=", "+a.b=c", "~data", "~data.train", "--frobnicate", "zero.stage=4", "model.lora.rank=-2",
    "eval.judge.command=[", "'", "loss.beta=é", "data.cache_dir=/dev/null", "reference.cache_dir=/dev/null/x",
    "run.dir=/dev/null/x", "run.dir=", "model=none", "optim=none", "loss={}", "train=[]", "zero={stage: 3}",
    "data.max_length=1", "data.max_length=99999999999999999999", "reference.path=nowhere", "reference.engine=none",
    "export.what=nothing", "cluster=nowhere", "hydra.run.dir=/dev/null/x", "train.keep_best=nothing")
