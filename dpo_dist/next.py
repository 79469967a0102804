"""`dpo-dist next RUN`: the next round's rows. Those that the run was trained on, without the pairs whose labels look
flipped; and, where a judge is given, the trained model's own answers to the same prompts, rated by it."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, get_type_hints

from dpo_dist.config.decode import decode
from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.words import words_of
from dpo_dist.dynamics.next_rows import NextRows, write_next_rows
from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.run_dir import RunDir

MOST_DROPPED = 0.1                           # share of the pairs that drop_suspects=auto leaves out, at most
HELP = f"""dpo-dist next RUN [next.KEY=VALUE ...]: writes the next round's rows and prints its command

  next.to=RUN/next/rows.jsonl   the file of the rows (of further data sets: rows-2.jsonl, ...). Beside it:
                                dropped.jsonl, the suspects that were left out; held_out.jsonl, where
                                data.eval_fraction held some out
  next.drop_suspects=auto       share of the pairs to leave out, the most suspicious first, from 0 to 0.5; auto = as
                                many as are flipped by the run's estimate, {MOST_DROPPED:.0%} at most; 0 = none

It reads run.json, suspects.jsonl and the files of data.train, and changes none of them.
"""


@dataclass(frozen=True)
class Options:
    """The keys after `next.`"""

    to: str | None = None
    drop_suspects: str = "auto"

    @staticmethod
    def of(words: Sequence[str]) -> Options:
        """UserError naming a key that is not one."""
        values: dict[str, Any] = {}
        kinds = get_type_hints(Options)
        for word in words:
            key, found, value = word.partition("=")
            name = key.removeprefix("next.")
            if not found or not key.startswith("next.") or name not in kinds:
                known = nearest(key, [f"next.{f.name}" for f in fields(Options)])
                raise UserError(f"unknown word '{word}': {known}; see dpo-dist next --help")
            values[name] = value
        return Options(**values)

    def share(self) -> float | None:
        """Of the pairs to leave out; None for auto."""
        if self.drop_suspects == "auto":
            return None
        try:
            share = float(self.drop_suspects)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 0.5:
            raise UserError(f"next.drop_suspects={self.drop_suspects} must be auto, or a share from 0 to 0.5")
        return share


def main(words: Sequence[str], out: TextIO) -> int:
    """Exit code: 0, or 2 for a user's mistake."""
    if not words or {"--help", "-h"} & set(words):
        print(HELP, file=out, end="")
        return 0 if words else 2
    os.environ["HF_HUB_OFFLINE"] = "1"                   # read when Hugging Face's libraries are imported
    try:
        run, options = RunDir(words[0].removeprefix("run.dir=")), Options.of(words[1:])
        share = options.share()
        config, passport = run_of(run)
        with contextlib.redirect_stdout(sys.stderr):
            lines = next_round(run, config, passport, options, share)
        print("\n".join(lines), file=out)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_of(run: RunDir) -> tuple[RunConfig, dict[str, Any]]:
    """(the run's config, its passport). UserError where the folder holds no run."""
    if not run.run_json.is_file():
        raise UserError(f"{run.path} holds no run: there is no {run.run_json.name}; give the run.dir of one, as in: "
                        "dpo-dist next runs/my-run")
    content = json.loads(run.run_json.read_text())
    return decode(content["config"]), content["passport"]


def next_round(run: RunDir, config: RunConfig, passport: dict[str, Any], options: Options,
               share: float | None) -> list[str]:
    """Writes the rows; what is told of them, with the next round's command."""
    from dpo_dist.data.prepare import prepare
    from dpo_dist.models.digest import tokenizer_digest
    from dpo_dist.models.tokenizer import load_tokenizer, tokenizer_folder

    folder = tokenizer_folder(config.model.path, "model.path", config.run.offline)
    pairs, held_out = prepare(config.data, load_tokenizer(folder), tokenizer_digest(folder))
    if pairs.digest != passport["train_pairs"]["digest"]:
        trained_on = passport["train_pairs"]["count"]
        raise UserError(f"data.train no longer gives the {trained_on:,} pairs that {run.path} was trained on; put its "
                        f"files back (dpo-dist verify {run.path} says what changed)")
    suspects = _suspects(run, len(pairs), share)
    to = Path(options.to) if options.to else run.next / "rows.jsonl"
    to.parent.mkdir(parents=True, exist_ok=True)
    rows = write_next_rows(config.data, pairs, held_out, {entry["pair"] for entry in suspects}, to)
    write_atomic(to.with_name("dropped.jsonl"), "".join(json.dumps(entry) + "\n" for entry in suspects))
    if not rows.train:
        raise UserError(f"next.drop_suspects={options.drop_suspects} leaves no row; lower it")
    told = [f"{rows.records:,} rows in {', '.join(data_set.path for data_set in rows.train)}",
            f"{rows.left_out:,} rows of {len(suspects):,} suspected pairs are left out: "
            f"{to.with_name('dropped.jsonl')}"]
    return [*told, *_command(run, config, rows)]


def _suspects(run: RunDir, pairs: int, share: float | None) -> list[dict[str, Any]]:
    """The lines of suspects.jsonl that are left out. UserError where they are wanted and the run has none."""
    if share == 0:
        return []
    if not run.suspects.is_file():
        raise UserError(f"{run.path} has no {run.suspects.name}: it is written at the end of training, of losses that "
                        "compare two answers; set next.drop_suspects=0 to keep all rows")
    if share is None:
        found = int(json.loads(run.datamap_json.read_text())["counts"]["suspects"])
        number = min(found, int(MOST_DROPPED * pairs))
    else:
        number = round(share * pairs)
    with run.suspects.open() as file:
        return [json.loads(line) for line in islice(file, number)]


def _command(run: RunDir, config: RunConfig, rows: NextRows) -> list[str]:
    """The next round's command, and what it does about the reference. UserError where the run left no model."""
    model = next((folder for folder in run.exports(config.export.merged, config.export.adapter) if folder.is_dir()),
                 None)
    if model is None:
        raise UserError(f"{run.path} has no trained model yet: the rows are written; finish the run for the command")
    data = replace(config.data, train=rows.train, eval=rows.eval,
                   eval_fraction=config.data.eval_fraction if config.data.eval else 0.0)
    after = replace(config, model=replace(config.model, path=str(model)), data=data,
                    run=replace(config.run, dir=_next_dir(run.path)))
    fixed = config.reference.path is not None
    reference = (f"reference.path={config.reference.path} stays, so its log-probs are in the cache by now" if fixed
                 else "the reference is this run's model; set reference.path to keep the one of this run")
    return ["", f"the next round ({reference}):", "", f"  {shlex.join(['dpo-dist', 'run', *words_of(after)])}"]


def _next_dir(folder: Path) -> str:
    """runs/tone → runs/tone-round-2 → runs/tone-round-3."""
    match = re.fullmatch(r"(.*)-round-(\d+)", str(folder))
    return f"{match[1]}-round-{int(match[2]) + 1}" if match else f"{folder}-round-2"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout))
