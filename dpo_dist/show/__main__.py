"""`dpo-dist show`: rows as they will be trained on. It needs no GPU, no weights and no run.dir, and writes nothing."""
from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig, RunConfig
from dpo_dist.runtime.without_torch import torch_hidden

if TYPE_CHECKING:
    from dpo_dist.show.rows import Outcome

SECONDS_TO_LOOK = 1.0                    # in all data sets together, beyond the first rows


def main(words: Sequence[str], out: TextIO) -> int:
    """Exit code: 0, or 2 for a user's mistake. `out` gets the rows and nothing else."""
    parser = argparse.ArgumentParser(prog="dpo-dist show")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(words)
    try:
        config = compose(options.overrides)
        # what is imported below says now and then a word on stdout
        with contextlib.redirect_stdout(sys.stderr):
            show(config, options.rows, options.json, out)
        out.flush()
        return 0
    except UserError as error:
        out.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2


def show(config: RunConfig, rows: int, as_json: bool, out: TextIO) -> None:
    """Writes the first `rows` rows of every data set; for a person also the longest and one at random. UserError for
    what ends reading, once the rows before it are shown."""
    if not config.data.train and not config.data.eval:
        raise UserError("data.train=[] names no data; set data.train=[{path: rows.jsonl}]")
    # Hugging Face's libraries read it when they are imported. That takes seconds, so the config's errors come first.
    os.environ["HF_HUB_OFFLINE"] = "1" if config.run.offline else "0"
    with torch_hidden():
        from dpo_dist.models.tokenizer import load_tokenizer, tokenizer_folder

        tokenizer = load_tokenizer(tokenizer_folder(config.model.path, "model.path", config.run.offline))
    from dpo_dist.data.tokenize import PairTokenizer
    from dpo_dist.runtime.terminal import page_console
    from dpo_dist.show.page import Page
    from dpo_dist.show.rows import lenient, look_at, outcomes

    encoder = PairTokenizer.of(tokenizer, lenient(config.data))
    if as_json:
        for key, dataset in _data_sets(config):
            for outcome in islice(outcomes(dataset, config.data, encoder)[0], rows):
                # all ASCII: texts may hold characters at which readers split lines, such as U+2028
                print(json.dumps(as_object(outcome, key, dataset, tokenizer)), file=out)
        return
    page, sets = Page(page_console(out), tokenizer, config.data), list(_data_sets(config))
    page.head(config.model.path, encoder.templates is not None)
    for key, dataset in sets:
        look = look_at(dataset, config.data, encoder, rows, config.train.seed, SECONDS_TO_LOOK / len(sets))
        page.data_set(key, dataset, look)
        if look.failure is not None:
            raise look.failure


def _data_sets(config: RunConfig) -> Iterator[tuple[str, DatasetConfig]]:
    for key, datasets in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for at, dataset in enumerate(datasets):
            yield key if len(datasets) == 1 else f"{key}[{at}]", dataset


def as_object(outcome: Outcome, key: str, dataset: DatasetConfig, tokenizer: Any | None) -> dict[str, Any]:
    """A row for a program: of a pair its ids, what counts and its texts; of another row why there is no pair."""
    from dpo_dist.show.rows import Trained
    from dpo_dist.show.text import decode

    place: dict[str, Any] = {"where": outcome.where, "data_set": dataset.name or dataset.path}
    if not isinstance(outcome, Trained):
        return {**place, "dropped": outcome.reason, "detail": outcome.detail, "stopped_by": outcome.stopped_by}
    pair = outcome.pair
    place["split"] = "eval" if outcome.held_out or key.startswith("data.eval") else "train"
    for name in ("prompt", "chosen", "rejected"):
        place[f"{name}_ids"] = getattr(pair, f"{name}_ids")
    for name in ("chosen", "rejected"):
        counts = getattr(pair, f"{name}_counts")
        place[f"{name}_counts"] = [1] * len(place[f"{name}_ids"]) if counts is None else [int(c) for c in counts]
    for name in ("prompt", "chosen", "rejected"):
        before = () if name == "prompt" else pair.prompt_ids
        place[name] = None if tokenizer is None else decode(tokenizer, place[f"{name}_ids"], before)
    return {**place, "lost_tokens": sum(outcome.lost_tokens), "strength": pair.strength, "weight": pair.weight,
            "tie": pair.tie, "record": pair.record, "left_out": pair.left_out}


if __name__ == "__main__":
    gc.disable()                         # what is imported stays: no collection needs to look at it
    try:
        sys.exit(main(sys.argv[1:], sys.stdout))
    except BrokenPipeError:              # the reader closed the pipe: dpo-dist show | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
