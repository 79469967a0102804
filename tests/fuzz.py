"""`python -m tests.fuzz --inputs 10000 --seed 0`: odd inputs for all that reads what a person or a disk gives.

An input may be read, be told as a UserError, be counted as bad rows, or be found damaged. Anything else is a finding,
and is printed with its number: `--only NUMBER` runs that one again, with its traceback.
"""
from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
from made_tokenizers import CHATML, bpe, config  # noqa: E402
from mutated import ROWS, SUFFIXES, changed_bytes, changed_row, changed_value, changed_words, file_of, json_text  # noqa: E402

from dpo_dist.config.compose import compose, parsed_for_sweep  # noqa: E402
from dpo_dist.config.errors import UserError  # noqa: E402
from dpo_dist.config.options import to_dict  # noqa: E402
from dpo_dist.config.safetensors_header import read_header  # noqa: E402
from dpo_dist.config.schema import DatasetConfig  # noqa: E402
from dpo_dist.config.words import words_of  # noqa: E402
from dpo_dist.data.prepare import prepare  # noqa: E402
from dpo_dist.data.rows import read_rows  # noqa: E402
from dpo_dist.data.sample import row_hashes  # noqa: E402
from dpo_dist.launcher.cli import plan_text  # noqa: E402
from dpo_dist.launcher.status import status  # noqa: E402
from dpo_dist.launcher.sweep.multirun import compose_each  # noqa: E402
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey, ShardWriter, sequence_key  # noqa: E402
from dpo_dist.runtime import remember  # noqa: E402
from dpo_dist.runtime.checksums import checksums, damage, write_checksums  # noqa: E402
from dpo_dist.runtime.files import sha256, write_json  # noqa: E402

SECONDS = 20.0                               # of one input; the longest take less than one on a quiet machine
Kind = Callable[[Random, Path], str]         # what became of the input, in a word


class Hung(BaseException):
    """An input that takes longer than SECONDS."""


def rows(random: Random, folder: Path) -> str:
    """Records of a format, changed, in a file of any kind, read as that format, as any other or as auto."""
    named, suffix = random.choice(list(ROWS)), random.choice(SUFFIXES)
    records = [changed_row(random.choice(ROWS[named]), random) for _ in range(random.randint(1, 4))]
    return _read(file_of(records, suffix), suffix, named, random, folder)


def files(random: Random, folder: Path) -> str:
    """A good file of any kind with other bytes."""
    named, suffix = random.choice(list(ROWS)), random.choice(SUFFIXES)
    data = file_of(ROWS[named] * random.randint(1, 3), suffix)
    for _ in range(random.choice([1, 1, 2])):
        data = changed_bytes(data, random)
    return _read(data, suffix, named, random, folder)


def _read(data: bytes, suffix: str, named: str, random: Random, folder: Path) -> str:
    path = folder / f"rows{suffix}"
    path.write_bytes(data)
    dataset = DatasetConfig(str(path), random.choice([named] * 4 + ["auto"] * 4 + [random.choice(list(ROWS))]),
                            columns=random.choice([None] * 8 + [{"prompt": "a"}, {"chosen": None}, {"weight": "tags"}]),
                            rows=random.choice([None] * 8 + [1, 2]), pairs_per_prompt=random.choice([None] * 8 + [1]))
    on_bad_row, ties = random.choice(["skip"] * 4 + ["error"]), random.choice(["drop", "keep"])
    if random.random() < 0.3:
        store, _ = prepare(config(train=(dataset,), on_bad_row=on_bad_row, cache_dir=str(folder / "cache"),
                                  on_missing_content="warn", ties=ties), _tokenizer(), "digest")
        found = [store[i] for i in range(len(store))]
        return "read" if found else "counted"
    stream, report = read_rows(dataset, on_bad_row, ties)
    for row in stream:
        row_hashes(row)
        json.dumps(row.record, ensure_ascii=False, allow_nan=False).encode()
    "".join(line for lines in report.bad.examples.values() for line in lines).encode()
    assert report.rows, "neither a row nor a word"
    return "read" if report.pairs else "counted"


@cache
def _tokenizer() -> Any:
    return bpe(CHATML)


def words(random: Random, folder: Path) -> str:
    """The words of a command, or of a sweep."""
    given = changed_words(random)
    try:
        if random.random() < 0.2:
            compose_each(parsed_for_sweep(given))
            return "read"
        found = compose(given)
        if random.random() < 0.2:
            assert compose(words_of(found)).identity() == found.identity()
        json.dumps(to_dict(found), allow_nan=False).encode()
    except UserError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 10_000, f"not one line: {error}"
        str(error).encode()
        raise
    return "read"


def plans(random: Random, folder: Path) -> str:
    """A model's config.json and weights, changed, and the plan of a run on it."""
    described = json.loads((REPO / "tests/golden/policy/config.json").read_text())
    for _ in range(random.choice([0, 1, 1, 2])):
        described = changed_value(described, random)
    text = json_text(described).encode()
    (folder / "config.json").write_bytes(changed_bytes(text, random) if random.random() < 0.2 else text)
    weights = safetensors.numpy.save({"model.embed_tokens.weight": np.zeros((8, 4), np.float32)})
    (folder / "model.safetensors").write_bytes(changed_bytes(weights, random) if random.random() < 0.3 else weights)
    extra = random.choice([["zero=auto"], ["model.lora.rank=4"], ["cluster.nodes=4", "cluster=slurm"], []])
    number = random.choice(["1", "7", "1000000", "9223372036854775807"])
    key = random.choice(["train.pairs_per_step", "train.tokens_per_microbatch", "data.max_length",
                         "cluster.procs_per_node"])
    given = ["cluster.device=cpu", f"model.path={folder}", *extra, f"{key}={number}"]
    assert plan_text(given, compose(given))
    return "read"


def models(random: Random, folder: Path) -> str:
    """A model's config.json and tokenizer, changed, as training reads them."""
    from dpo_dist.models.folder import read_config
    from dpo_dist.models.tokenizer import load_tokenizer

    shutil.copytree(_model(), folder, dirs_exist_ok=True)
    path = folder / random.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
    data = path.read_bytes()
    if path.suffix == ".json" and random.random() < 0.7:
        path.write_text(json_text(changed_value(json.loads(data), random)))
    else:
        path.write_bytes(changed_bytes(data, random))
    load_tokenizer(folder)
    read_config(folder)
    return "read"


@cache
def _model() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dpo-dist-fuzz-model-"))
    shutil.copytree(REPO / "tests/golden/policy", folder, dirs_exist_ok=True)
    from conftest import write_tiny_llama
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    write_tiny_llama(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def headers(random: Random, folder: Path) -> str:
    """A safetensors file, changed."""
    path = folder / "a.safetensors"
    data = safetensors.numpy.save({"a": np.zeros((3, 2), np.float32), "b": np.ones(5, np.int64)}, {"k": "v"})
    if random.random() < 0.5:
        size = int.from_bytes(data[:8], "little")
        header = json_text(changed_value(json.loads(data[8:8 + size]), random)).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + size:]
    else:
        data = changed_bytes(data, random)
    path.write_bytes(data)
    start, tensors = read_header(path)
    assert all(start + entry["data_offsets"][1] <= len(data) for entry in tensors.values())
    return "read"


# ---------------------------------------------------------------------------------------------------------- cache files


def sealed(random: Random, folder: Path) -> str:
    """A folder with checksums (a token cache, a checkpoint, an export) of which some file is another."""
    marker = random.choice(["CHECKSUMS.json", "COMPLETE"])
    for name in ("meta.json", "train/ids.npy", "train/spans.npy"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(random.randbytes(random.choice([0, 1, 100, 5000])))
    if marker == "COMPLETE":
        write_json(folder / marker, checksums(folder))
    else:
        write_checksums(folder)
    path = folder / random.choice(["meta.json", "train/ids.npy", "train/spans.npy", marker])
    before = path.read_bytes()
    if path.name == marker and random.random() < 0.7:
        path.write_text(json_text(changed_value(json.loads(before), random)))
    elif random.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(changed_bytes(before, random))
    found = damage(folder, marker)
    assert all(isinstance(phrase, str) and phrase for phrase in found)
    if path.name != marker and (not path.exists() or path.read_bytes() != before):
        assert found, f"{path.name} is another, and nothing is said"
    return "damaged" if found else "read"


def tokens(random: Random, folder: Path) -> str:
    """The token cache of a data set, changed; then the same data set is asked for again."""
    data = folder / "rows.jsonl"
    data.write_bytes(file_of(ROWS["token_ids"] * 4, ".jsonl"))
    given = config(train=(DatasetConfig(str(data)),), cache_dir=str(folder / "cache"))
    whole = [prepare(given, None, None)[0][i] for i in range(4)]
    path = random.choice(sorted(p for p in (folder / "cache").rglob("*") if p.is_file()))
    before = path.read_bytes()
    path.write_bytes(changed_bytes(before, random))
    store, _ = prepare(given, None, None)
    assert [store[i] for i in range(len(store))] == whole, f"other pairs, as {path.relative_to(folder)} is another"
    return "read"


def shards(random: Random, folder: Path) -> str:
    """A shard of the reference cache, or its key.json, changed."""
    key = ReferenceKey("weights", "fp32")
    cache_ = LogpCache(str(folder), key)
    writer = ShardWriter(cache_)
    writer.add(sequence_key([1, 2], [3, 4]), np.array([-1.0, -2.0]))
    writer.flush()
    path = random.choice(sorted(cache_.folder.iterdir()))
    before, after = path.read_bytes(), changed_bytes(path.read_bytes(), random)
    path.write_bytes(after)
    again = LogpCache(str(folder), key)
    names, damaged = again.verified_shards()
    again.open_shards(names)
    if path.suffix == ".safetensors" and after != before:
        assert damaged == 1 and not names, "a damaged shard is believed"
        return "damaged"
    assert again.logps([1, 2], [3, 4]).tolist() == [-1.0, -2.0]
    return "read"


def notes(random: Random, folder: Path) -> str:
    """A remembered digest, changed: what is told is the file's own digest all the same."""
    file, memory = folder / "data", folder / "memory"
    file.write_bytes(b"rows")
    past = time.time() - 100
    os.utime(file, (past, past))
    settled, remember.SETTLED_SECONDS = remember.SETTLED_SECONDS, -10.0
    try:
        remember.remembered(memory, "sha256", file, sha256)
        (note,) = memory.iterdir()
        before = note.read_bytes()
        if random.random() < 0.5:
            note.write_text(json_text(changed_value(json.loads(before), random)))
        else:
            note.write_bytes(changed_bytes(before, random))
        assert remember.remembered(memory, "sha256", file, sha256) == sha256(file), "another digest is believed"
    finally:
        remember.SETTLED_SECONDS = settled
    return "read"


def runs(random: Random, folder: Path) -> str:
    """The files of a run that `status` reads, changed."""
    (folder / "logs").mkdir()
    files = {"run.json": {"config": {"train": {"max_steps": 4, "keep_best": "loss"}}, "identity_of": {}},
             "FAILED": {"message": "no room", "exit_code": 2, "rank": 1, "node": 0},
             "PREEMPTED": {"message": "stopped", "signal": 15}, "pushed.json": {"commit": "abc"}, "slurm.json": {}}
    for name, content in files.items():
        if random.random() < 0.7:
            text = json_text(changed_value(content, random) if random.random() < 0.6 else content).encode()
            (folder / name).write_bytes(changed_bytes(text, random) if random.random() < 0.3 else text)
    metrics = [{"step": step, "split": split, "loss": 0.5} for step in (1, 2) for split in ("train", "eval")]
    lines = "".join(json_text(changed_value(row, random) if random.random() < 0.4 else row) + "\n" for row in metrics)
    text = lines.encode()
    (folder / "metrics.jsonl").write_bytes(changed_bytes(text, random) if random.random() < 0.4 else text)
    if random.random() < 0.5:
        (folder / "checkpoints/step-000001").mkdir(parents=True)
        (folder / "checkpoints/step-000001/COMPLETE").write_bytes(random.choice([b"", b"{}", b"\xff", b"[" * 3000]))
    status(folder).encode("utf-8", "backslashreplace")
    return "read"


# {kind: its share of the inputs}
KINDS: dict[Kind, int] = {rows: 40, files: 14, words: 8, plans: 8, models: 1, headers: 6, sealed: 4, tokens: 2,
                          shards: 3, notes: 3, runs: 6}


def one(number: int, seed: int, folder: Path) -> tuple[str, str, str]:
    """(its kind, what became of it, the traceback of a finding or nothing) of an input."""
    random = Random(f"{seed}/{number}")
    kind = random.choices(list(KINDS), KINDS.values())[0]
    folder.mkdir()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return kind.__name__, kind(random, folder), ""
    except UserError as error:
        assert str(error)
        return kind.__name__, "told", ""
    except (Exception, Hung):
        return kind.__name__, "FOUND", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(inputs: range, seed: int, show: Callable[[str], None] = print) -> int:
    """How many findings there are; each is shown, and in the end the inputs by kind and by what became of them."""
    def hung(number: int, frame: Any) -> None:
        raise Hung(f"more than {SECONDS:g} seconds")

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, hung)
    logging.disable(logging.CRITICAL)
    counts: Counter[tuple[str, str]] = Counter()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None           # many small files, none of which is to last
    scratch = Path(tempfile.mkdtemp(prefix="dpo-dist-fuzz-", dir=memory))
    try:
        for number in inputs:
            kind, ended, trace = one(number, seed, scratch / "input")
            counts[kind, ended] += 1
            if trace:
                lines = trace.strip().splitlines()
                place = [line.strip() for line in lines if "dpo_dist" in line and line.strip().startswith("File")]
                show(f"FOUND {kind} --seed {seed} --only {number}: {lines[-1][:300]}\n      {(place or [''])[-1]}")
                if len(inputs) == 1:
                    show(trace)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGALRM, before)
    found = sum(n for (_, ended), n in counts.items() if ended == "FOUND")
    for name in (kind.__name__ for kind in KINDS):
        ends = {ended: n for (kind, ended), n in sorted(counts.items()) if kind == name}
        show(f"{name:8} {sum(ends.values()):6}  {', '.join(f'{ended} {n}' for ended, n in ends.items())}")
    show(f"inputs {len(inputs)}, findings {found}, seconds {time.monotonic() - began:.0f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=[kind.__name__ for kind in KINDS], help="of these kinds alone")
    parser.add_argument("--only", type=int, help="the number of one input, shown with its traceback")
    given = parser.parse_args()
    inputs = range(given.inputs) if given.only is None else range(given.only, given.only + 1)
    if given.kinds:
        for kind in [kind for kind in KINDS if kind.__name__ not in given.kinds]:
            KINDS.pop(kind)
    return 1 if fuzz(inputs, given.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
