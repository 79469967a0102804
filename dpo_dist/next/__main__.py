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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dpo_dist.config.decode import decode
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig, RunConfig
from dpo_dist.config.words import words_of
from dpo_dist.next.options import HELP, MOST_DROPPED, Options
from dpo_dist.runtime.checksums import checksum
from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.hub_commits import pin
from dpo_dist.runtime.json_files import found_sealed
from dpo_dist.runtime.json_lines import whole_and_broken
from dpo_dist.runtime.run_dir import RunDir

if TYPE_CHECKING:
    from dpo_dist.data.store import PairStore
    from dpo_dist.next.rows import NextRows

def main(words: Sequence[str], out: TextIO) -> int:
    """Exit code: 0, or 2 for a user's mistake."""
    if not words or {"--help", "-h"} & set(words):
        print(HELP, file=out, end="")
        return 0 if words else 2
    os.environ["HF_HUB_OFFLINE"] = "1"                   # read when Hugging Face's libraries are imported
    try:
        run, options = RunDir(words[0].removeprefix("run.dir=")), Options.of(words[1:])
        config, passport = run_of(run)
        with contextlib.redirect_stdout(sys.stderr):
            lines = next_round(run, config, passport, options)
        print("\n".join(lines), file=out)
        return 0
    except (UserError, OSError) as error:    # OSError: of a folder that may not be looked at, or a disk that is full
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_of(run: RunDir) -> tuple[RunConfig, dict[str, Any]]:
    """(the run's config, its passport). UserError where the folder holds no run."""
    pin(run.hub_commits())
    content = run.written("next")
    return decode(content["config"]), content["passport"]


def next_round(run: RunDir, config: RunConfig, passport: dict[str, Any], options: Options) -> list[str]:
    """Writes the rows; what is told of them, with the next round's command."""
    from dpo_dist.data.prepare import prepare
    from dpo_dist.models.file_digests import tokenizer_digest
    from dpo_dist.models.tokenizer import load_tokenizer, tokenizer_folder
    from dpo_dist.next.rows import write_next_rows

    folder = tokenizer_folder(config.model.path, "model.path", config.run.offline)
    tokenizer = load_tokenizer(folder)
    pairs, held_out = prepare(config.data, tokenizer, tokenizer_digest(folder), print)
    if pairs.digest != passport["train_pairs"]["digest"]:
        trained_on = passport["train_pairs"]["count"]
        raise UserError(f"data.train no longer gives the {trained_on:,} pairs that {run.path} was trained on; put its "
                        f"files back (dpo-dist verify {run.path} says what changed)")
    suspects = _suspects(run, len(pairs), options.drop_suspects)
    to = Path(options.to) if options.to else run.next / "rows.jsonl"
    to.parent.mkdir(parents=True, exist_ok=True)
    rows = write_next_rows(config.data, pairs, held_out, {entry["pair"] for entry in suspects}, to)
    write_atomic(to.with_name("dropped.jsonl"), "".join(json.dumps(entry) + "\n" for entry in suspects))
    if not rows.train:
        raise UserError(f"next.drop_suspects={options.drop_suspects} leaves no row; lower it")
    told = [f"{rows.records:,} rows in {', '.join(data_set.path for data_set in rows.train)}",
            f"{rows.left_out:,} rows of {len(suspects):,} suspected pairs are left out: "
            f"{to.with_name('dropped.jsonl')}"]
    trains = list(rows.train)
    if options.answers:
        file = to.with_name("answers.jsonl")
        told.append(_answer(run, config, passport, options, pairs, tokenizer, file))
        trains.append(DatasetConfig(str(file), "ratings"))
    return [*told, *_command(run, config, replace(rows, train=tuple(trains)))]


def _answer(run: RunDir, config: RunConfig, passport: dict[str, Any], options: Options, pairs: PairStore,
            tokenizer: Any, file: Path) -> str:
    """Writes the rated answers; what became of them, in a line. UserError where there is no model, or no row."""
    import torch

    from dpo_dist.judge import open_judge
    from dpo_dist.models.workers import quiet
    from dpo_dist.next.answers import write_answers
    from dpo_dist.policy.answers import Asking
    from dpo_dist.run.samples import stop_ids
    from dpo_dist.runtime.terminal import Terminal

    if not run.model.is_dir():
        raise UserError(f"next.answers={options.answers} needs {run.model}: finish the run, or write it with dpo-dist "
                        "export and export.what=merged")
    if tokenizer is None:
        raise UserError(f"next.answers={options.answers} needs a tokenizer, which model.path={config.model.path} lacks")
    judge = open_judge(options.judge_command, options.judge_url, "next.judge", options.timeout_seconds)
    quiet()
    gpus = 0 if config.cluster.device == "cpu" else torch.cuda.device_count()
    asking = Asking(options.answers, options.temperature, options.max_new_tokens, options.seed,
                    stop_ids(run.model, tokenizer, config), passport["dtype"])
    terminal = Terminal.start(str(run.path / "logs" / "next.log"), is_main=True, capture=False)
    found = write_answers(file, run.model, config.data, pairs, tokenizer, asking, judge, gpus, terminal)
    if not found.rows:
        raise UserError(f"{file}: of {found.prompts:,} prompts none has answers that the judge scores differently "
                        f"({found.cut:,} answers were cut or empty); raise next.answers or next.max_new_tokens")
    return (f"{found.rows:,} prompts with rated answers in {file}; {found.alike:,} prompts have no two answers of "
            f"unequal score, {found.cut:,} answers were cut or empty")


def _suspects(run: RunDir, pairs: int, share: float | None) -> list[dict[str, Any]]:
    """The lines of suspects.jsonl that are left out. UserError where they are wanted and the run has none."""
    if share == 0:
        return []
    if not run.suspects.is_file():
        raise UserError(f"{run.path} has no {run.suspects.name}: it is written at the end of training, of losses that "
                        "compare two answers; set next.drop_suspects=0 to keep all rows")
    known = found_sealed(run.datamap_json)
    rows, broken = whole_and_broken(run.suspects, {"rank": (int,), "pair": (int,)})
    if known is None or broken or known["suspects_jsonl"] != checksum(run.suspects):
        raise UserError(f"{run.suspects} or {run.datamap_json.name} is damaged; remove {run.model} and give the "
                        "command that trained the run again, which trains no step and writes them anew; or set "
                        "next.drop_suspects=0 to keep all rows")
    number = min(known["counts"]["suspects"], int(MOST_DROPPED * pairs)) if share is None else round(share * pairs)
    return rows[:number]


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
