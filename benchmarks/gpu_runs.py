"""The product itself on one GPU: `python -m dpo_dist.train`, as a user starts it; one process a part, started by
gpu.py.

Models of real shapes with random weights, rows of token ids, the reference cached, 12 steps, the first 3 of which are
left out. `mfu` counts the FLOPs of distinct tokens (a prompt once, nothing recomputed) against the data sheet,
`of_product` against a product of random bf16 data timed on the same card in the same part. `predicted_gib`: what
`dpo-dist plan` says, against `peak_gib`, what torch's allocator held. The parts that end in `-trl` are gpu_trl.py on
the same rows.
"""
from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_part import arguments, is_wanted, tell

HERE = Path(__file__).parent
STEPS, LEFT_OUT = 12, 3


@dataclass(frozen=True)
class Case:
    model: str
    pairs: int                          # of a step
    length: int = 2048                  # tokens of prompt and chosen completion
    prompt_share: float = 0.5
    # of a pack, at most: two pairs of 2k, so that 80 GB recompute few whole layers; twice that on 141 GB
    tokens: int = 6144
    overrides: tuple[str, ...] = ()
    trl: tuple[str, ...] = ()           # ways of TRL to run instead


CASES = {
    "3B-zero2": Case("3B", 32, overrides=("zero=zero2",)),
    "3B-none": Case("3B", 32, overrides=("zero=none",)),
    "3B-zero3": Case("3B", 32, overrides=("zero=zero3",)),
    "3B-eager": Case("3B", 32, overrides=("zero=zero2", "model.kernels=eager")),
    "3B-recompute": Case("3B", 32, overrides=("zero=zero2", "model.gradient_checkpointing=true")),
    "3B-8k": Case("3B", 8, 8192, overrides=("zero=zero2",)),
    "3B-tenth": Case("3B", 32, prompt_share=0.1, overrides=("zero=zero2",)),
    "0.5B-zero2": Case("0.5B", 64, tokens=32_768, overrides=("zero=zero2",)),
    "0.5B-none": Case("0.5B", 64, tokens=32_768, overrides=("zero=none",)),
    "0.5B-zero3": Case("0.5B", 64, tokens=32_768, overrides=("zero=zero3",)),
    "0.5B-8k": Case("0.5B", 16, 8192, tokens=32_768, overrides=("zero=zero2",)),
    "1.5B-zero2": Case("1.5B", 32, tokens=16_384, overrides=("zero=zero2",)),
    "8B-lora": Case("8B", 16, tokens=8192, overrides=("zero=zero2", "model.lora.rank=32", "reference=adapter_off")),
    "8B-lora-32k": Case("8B", 2, 32_768, overrides=("zero=zero2", "model.lora.rank=32", "reference=adapter_off")),
    "8B-full": Case("8B", 16, overrides=("zero=zero2", "zero.offload_optimizer=cpu")),
    "3B-trl": Case("3B", 32, trl=("precomputed", "live")),
    "0.5B-trl": Case("0.5B", 64, tokens=32_768, trl=("precomputed", "live")),
    "1.5B-trl": Case("1.5B", 32, tokens=16_384, trl=("precomputed", "live")),
}


def smoke(case: Case) -> Case:
    return Case("tiny", 4, 48, case.prompt_share, 400, tuple(o for o in case.overrides if "kernels=fused" not in o),
                case.trl[:1])


def run(part: str, case: Case, folder: Path) -> None:
    import torch
    from gpu_shapes import on_gpu, write_model, write_rows

    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "zero.offload_optimizer=cpu" in case.overrides and on_gpu() and host_bytes < 170e9:
        tell("ours", model=case.model, does_not_fit="the optimizer's state takes 129 GB of the host's memory, beside "
                                                    "what loading takes")
        return
    model = write_model(case.model, folder / case.model)
    lengths = write_rows(folder / "rows.jsonl", case.model, 4 * case.pairs, case.length, case.prompt_share)
    run_dir = folder / "run"
    longest = max(prompt + chosen + rejected for prompt, chosen, rejected in lengths)
    roomy = on_gpu() and torch.cuda.get_device_properties(0).total_memory > 100e9
    overrides = [f"model.path={model}", f"data.train=[{{path: {folder / 'rows.jsonl'}, format: token_ids}}]",
                 f"run.dir={run_dir}", f"data.cache_dir={folder / 'tokens'}",
                 f"reference.cache_dir={folder / 'reference'}", f"data.max_length={2 * case.length}",
                 f"train.pairs_per_step={case.pairs}", f"train.max_steps={STEPS}", f"train.epochs={STEPS}",
                 "optim.schedule=constant",
                 f"train.tokens_per_microbatch={max(case.tokens * (2 if roomy else 1), longest)}",
                 "train.save_every_steps=null", f"cluster.device={'cuda' if on_gpu() else 'cpu'}", *case.overrides]
    began = time.monotonic()
    # What comes after the last step, a checkpoint and an export of the weights, is no subject here and takes long: not
    # waited for.
    log = folder / "output.txt"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "dpo_dist.train", *overrides], stdout=out,
                                   stderr=subprocess.STDOUT, cwd=HERE.parent)
    rows = wait_for_steps(process, run_dir / "metrics.jsonl")
    wall = time.monotonic() - began
    if process.poll() is None:
        process.kill()
        process.wait()
    if len(rows) < STEPS - 1:
        sys.exit(f"{part}: {len(rows)} of {STEPS} steps\n{log.read_text()[-2500:]}")
    timed = rows[LEFT_OUT:]
    seconds = statistics.median(case.pairs / row["perf/pairs_per_second"] for row in timed)
    figures: dict[str, Any] = {
        "step_seconds": round(seconds, 4),
        "spread": spread([case.pairs / row["perf/pairs_per_second"] for row in timed]),
        "pairs_a_second": round(case.pairs / seconds, 3), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"],
        **{key: round(statistics.median(row[f"perf/{key}"] for row in timed), 4) for key in
           ("tokens_per_second", "data_seconds", "forward_seconds", "backward_seconds", "wait_seconds", "step_seconds")
           if f"perf/{key}" in rows[0] and key != "step_seconds"},
        "update_seconds": round(statistics.median(row["perf/step_seconds"] for row in timed), 4),
        "peak_gib": round(rows[-1]["perf/peak_memory_gib"], 2), "predicted_gib": predicted(overrides),
        "chosen": next((line for line in log.read_text().splitlines() if line.startswith("memory: ")), None),
        "attention": next((line for line in log.read_text().splitlines() if line.startswith("attention: ")), None),
        "start_to_last_step_seconds": round(wall, 1)}
    if "perf/mfu" in rows[0]:
        mfu = statistics.median(row["perf/mfu"] for row in timed)
        rate = product_tflops()
        figures |= {"mfu": round(mfu, 4), "product_tflops": round(rate, 1),
                    "of_product": round(mfu * rows[0]["perf/peak_tflops"] / rate, 4)}
    tell("ours", model=case.model, pairs=case.pairs, length=case.length, prompt_share=case.prompt_share,
         overrides=" ".join(case.overrides), **figures)


def wait_for_steps(process: subprocess.Popen[bytes], file: Path) -> list[dict[str, Any]]:
    """The rows of training, once all steps are logged or the process has ended."""
    while True:
        ended = process.poll() is not None
        rows = []
        if file.exists():
            for line in file.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:                       # being written
                    break
        rows = [row for row in rows if row["split"] == "train"]
        if ended or len(rows) >= STEPS - 1:              # the last one comes with the checkpoint
            return rows
        time.sleep(0.2)


def spread(values: list[float]) -> float:
    return round((max(values) - min(values)) / statistics.median(values), 3)


def product_tflops() -> float:
    import torch
    from gpu_shapes import device, median_seconds, on_gpu

    n = 8192 if on_gpu() else 256
    a, b = (torch.randn(n, n, device=device()).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, repeats=20) / 1e12


def predicted(overrides: list[str]) -> float | None:
    """GiB a rank that `plan` says."""
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "plan", *overrides], capture_output=True,
                          text=True, cwd=HERE.parent)
    found = re.search(r"memory +([\d.]+) GiB a rank", done.stdout)
    return float(found[1]) if found else None


def run_trl(case: Case, way: str, folder: Path) -> None:
    from gpu_shapes import write_model, write_rows

    write_model(case.model, folder / case.model)
    write_rows(folder / "rows.jsonl", case.model, 4 * case.pairs, case.length, case.prompt_share)
    done = subprocess.run([sys.executable, HERE / "gpu_trl.py", folder / case.model, folder / "rows.jsonl", way,
                           str(case.pairs)],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2500:])
    tell(f"trl {way}", model=case.model, pairs=case.pairs, length=case.length, prompt_share=case.prompt_share,
         **json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    given = arguments()
    case = smoke(CASES[given.part]) if given.smoke else CASES[given.part]
    names = [name for name in [f"trl {way}" for way in case.trl] or ["ours"] if is_wanted(given, name)]
    if not names:
        return
    from gpu_shapes import on_gpu  # torch and transformers: seconds, where there is work for them

    models = Path(os.environ.get("TMPDIR", "/tmp")) / "dpo-dist-models"           # written once a machine
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        (folder / case.model).symlink_to(models / (case.model + ("" if on_gpu() else "-cpu")), target_is_directory=True)
        (models / (case.model + ("" if on_gpu() else "-cpu"))).mkdir(exist_ok=True)
        for name in names:
            run_trl(case, name.removeprefix("trl "), folder) if case.trl else run(given.part, case, folder)


if __name__ == "__main__":
    main()
