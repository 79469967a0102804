"""What one GPU does with this project: gpu.py [probes|runs] [--only REGEX] [--cases REGEX] [--out FOLDER] [--again]
[--cpu-smoke]; by gpu.sh.

probes   what the card and its libraries do, piece by piece (gpu_probes.py), the most telling first
runs     the product itself: `python -m dpo_dist.train` on models of real shapes with random weights (gpu_runs.py),
beside TRL (gpu_trl.py)

Each part is a process of its own with a limit of its own (PARTS); results are written after every row, so that what was
measured stays when the time is over. A part that fails or takes too long is a row that says so. Rows that the same
card, torch and code have given already are not measured again; --again measures all. --only, --cases: parts, and cases
in them, whose whole name the expression matches. --cpu-smoke: tiny shapes on the CPU, about a minute, to see that
everything works; results go to --out, or are thrown away.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parent
# (part, seconds it may take on a GPU), in the order of their worth; the sums stay within a call's seconds. Estimates
# from the shapes, not measured: a process takes about 12 s to import everything and to reach the GPU.
PARTS: dict[str, list[tuple[str, int]]] = {
    "probes": [("machine", 30), ("rates", 40), ("golden", 60), ("attention", 70), ("head", 60), ("elementwise", 50),
               ("profile", 120)],
    "runs": [("3B-zero2", 110), ("3B-trl", 100), ("0.5B-zero2", 70), ("0.5B-trl", 70), ("8B-lora", 150),
             ("3B-none", 100), ("0.5B-zero3", 70), ("0.5B-none", 70), ("3B-8k", 100), ("3B-tenth", 100),
             ("3B-zero3", 110), ("3B-eager", 110), ("3B-recompute", 110), ("0.5B-8k", 70), ("1.5B-zero2", 80),
             ("1.5B-trl", 90), ("8B-lora-32k", 170), ("8B-full", 200)],
}
SECONDS = {"probes": 235.0, "runs": 410.0}             # of a call
SMOKE_RUNS = "3B-zero2|0.5B-none|8B-lora|3B-recompute"      # of --cpu-smoke, which has a minute


def main(call: str, only: str, cases: str, out: Path, again: bool, smoke: bool) -> int:
    header = {"card": card(), "code": code_digest(), "smoke": smoke}
    file = out / f"gpu-{header['card'].replace(' ', '-')}-{call}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    rows = [row for row in known.get("rows", []) if "failed" not in row and not again
            and known.get("code") == header["code"]]
    until, out_of_time = time.monotonic() + SECONDS[call], []
    for part, limit in PARTS[call]:
        done = {f"{row['part']}/{row['case']}" for row in rows}
        if not re.fullmatch(only, part):
            continue
        left = until - time.monotonic()
        if left < min(limit, 45):
            out_of_time.append(part)
            continue
        def found(row: dict[str, Any], part: str = part) -> None:
            keep(file, header, rows, {"part": part, **row})

        began = time.monotonic()
        problem = run_part(call, part, min(limit, left), cases, done, smoke, found)
        if problem:
            found({"case": "-", "failed": problem})
        print(f"# {part}: {time.monotonic() - began:.0f} s", flush=True)
    print(table(rows))
    if out_of_time:
        print(f"no time was left for {', '.join(out_of_time)}: the same command runs them")
    return int(any("failed" in row for row in rows))


def run_part(call: str, part: str, limit: float, cases: str, done: set[str], smoke: bool, found: Any) -> str | None:
    """What went wrong, or None. `found` is given each row as soon as it is printed."""
    words = [sys.executable, HERE / f"gpu_{call}.py", part, "--cases", cases, "--done", *sorted(done),
             *(["--smoke"] if smoke else [])]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer, errors = threading.Timer(limit, end), []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    timer.start()
    reader.start()
    for line in process.stdout or ():
        if line.startswith("{"):
            found(json.loads(line))
            print(f"{part}: {line.strip()[:300]}", flush=True)
    code = process.wait()
    timer.cancel()
    reader.join(5)
    if late.is_set():
        return f"took longer than {limit:.0f} s"
    return None if code == 0 else f"exit code {code}: {''.join(errors)[-1500:]}"


def keep(file: Path, header: dict[str, Any], rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Adds the row, in the place of an earlier one of the same name, and writes all of them."""
    rows[:] = [other for other in rows if (other["part"], other["case"]) != (row["part"], row["case"])] + [row]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    partial.rename(file)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, its numbers shortened."""
    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]

    return "\n".join(
        f"{row['part']}/{row['case']}: " + ", ".join(f"{key} {short(value)}" for key, value in row.items()
                                                     if key not in ("part", "case")) for row in rows)


def card() -> str:
    """The card's name as its driver tells it, or CPU. Without torch, whose import takes seconds."""
    try:
        shown = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                               text=True, timeout=20)
        return shown.stdout.splitlines()[0].strip() if shown.returncode == 0 else "CPU"
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "CPU"


def code_digest() -> str:
    """Of the package and the benchmarks that are run: results of other code are not mixed with these."""
    files = sorted([*(REPO / "dpo_dist").rglob("*.py"), *HERE.glob("gpu*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("call", choices=PARTS, nargs="?")
    words.add_argument("--only")
    words.add_argument("--cases", default=".*")
    words.add_argument("--out", type=Path)
    words.add_argument("--again", action="store_true")
    words.add_argument("--cpu-smoke", action="store_true")
    given = words.parse_args()
    if not given.cpu_smoke and card() == "CPU":
        sys.exit("no NVIDIA GPU here (nvidia-smi does not answer); --cpu-smoke tries everything in small on the CPU")
    with tempfile.TemporaryDirectory() as thrown_away:
        out = given.out or (Path(thrown_away) if given.cpu_smoke else HERE / "results")
        codes = [main(call, given.only or (SMOKE_RUNS if given.cpu_smoke and call == "runs" else ".*"), given.cases,
                      out, given.again, given.cpu_smoke) for call in ([given.call] if given.call else PARTS)]
    sys.exit(max(codes))
