"""What `dpo-dist audit` takes on two cores for 100,000 rows: audit.py [ROWS].

Two clean sets by tests/clean_rows.py, with a planted defect in every hundredth row: one of hh-like length (about 250
tokens a pair) and one of about 900, each with 1,000 held-out prompts. Told are wall seconds of the whole command,
processor seconds of all its processes, and the largest sum, over time, of their memory (PSS: what several share counts
once). Results: benchmarks/results/audit.json.
"""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parent
sys.path.append(str(REPO / "tests"))
CORES = 2
SENTENCES = {"short": (4, 9), "long": (23, 37)}                # of an answer
PLANTED = {"duplicate_pair": 300, "near_duplicate_prompt": 300, "contradiction": 200, "special_tokens_in_text": 100,
           "language_mix": 100}
ADD_ROWS = ("duplicate_pair", "near_duplicate_prompt", "contradiction")
MIB = 2**20


def main(rows: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        results = {name: measured(Path(temporary) / name, rows, sentences) for name, sentences in SENTENCES.items()}
    results = {"rows": rows, "cores": CORES, "sets": results}
    (HERE / "results" / "audit.json").write_text(json.dumps(results, indent=2) + "\n")


def measured(folder: Path, rows: int, sentences: tuple[int, int]) -> dict[str, object]:
    """One set: what it is, what auditing it took, and what was found."""
    folder.mkdir()
    tokens = in_own_process("prepare", folder, rows, *sentences)["tokens_a_pair"]
    out = audited(folder)
    audit = json.loads((folder / "run" / "audit.json").read_text())
    assert audit["pairs"] >= rows, audit["pairs"]
    print(json.dumps(out), flush=True)
    return {"tokens_a_pair": tokens, "megabytes": round((folder / "rows.jsonl").stat().st_size / 1e6), **out,
            "findings": {finding["kind"]: finding["count"] for finding in audit["findings"]}}


def audited(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "dpo_dist.launcher.cli", "audit", f"data.train={folder / 'rows.jsonl'}",
               f"model.path={folder / 'model'}", f"data.eval={folder / 'held_out.jsonl'}",
               f"data.cache_dir={folder / 'tokens'}", f"run.dir={folder / 'run'}",
               "audit.fail_on=none", "data.on_bad_row=skip", "cluster.device=cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, preexec_fn=on_two_cores)
    watch = Watch(process.pid)
    watch.start()
    assert process.stdout is not None
    said = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    watch.ended.set()
    watch.join()
    if code:
        sys.exit(f"the audit failed:\n{said[-3000:]}")
    return {"seconds": round(time.monotonic() - began, 1), "peak_mib": round(watch.peak / MIB),
            "largest_process_mib": round(watch.largest / MIB), "processes": watch.processes,
            "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def on_two_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


class Watch(threading.Thread):
    """Looks five times a second at the memory of a process and all that it started."""

    def __init__(self, root: int):
        super().__init__(daemon=True)
        self.root, self.ended = root, threading.Event()
        self.peak = self.largest = self.processes = 0

    def run(self) -> None:
        while not self.ended.wait(0.2):
            sizes = [size for pid in tree(self.root) if (size := shared_fairly(pid))]
            self.peak = max(self.peak, sum(sizes))
            self.largest = max([self.largest, *sizes])
            self.processes = max(self.processes, len(sizes))


def tree(root: int) -> Iterator[int]:
    yield root
    try:
        children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    except OSError:
        return                                                 # it has ended
    for child in children:
        yield from tree(int(child))


def shared_fairly(pid: int) -> int:
    """Bytes of a process's memory, where a page that n processes hold counts as a n-th (PSS); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def in_own_process(*words: object) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(folder: Path, n: int, sentences: tuple[int, int]) -> None:
    """Writes rows and tokenizer, and prints how many tokens a pair has."""
    from clean_rows import clean_rows
    from planted import plant_all
    from unigram_model import write_tokenizer

    from dpo_dist.demo import TEMPLATE

    counts = {kind: count * n // 100_000 for kind, count in PLANTED.items()}
    clean = clean_rows(n - sum(counts[kind] for kind in ADD_ROWS), sentences=sentences)
    rows, _ = plant_all(clean, counts, random.Random(0))
    for name, written in (("rows", rows), ("held_out", clean_rows(1000, seed=1))):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in written)
    texts = [[row[key] for key in ("prompt", "chosen", "rejected")] for row in rows[:2000]]
    tokenizer = write_tokenizer(folder / "model", [text for row in texts for text in row], TEMPLATE, 16_000)
    counts = [sum(map(len, tokenizer(row)["input_ids"])) for row in texts]
    print(json.dumps({"tokens_a_pair": round(sum(counts) / len(counts))}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        prepare(Path(sys.argv[2]), int(sys.argv[3]), (int(sys.argv[4]), int(sys.argv[5])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
