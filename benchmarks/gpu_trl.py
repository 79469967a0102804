"""TRL's own DPO trainer at its best on one GPU, on the rows of gpu_runs.py: gpu_trl.py MODEL ROWS live|precomputed
PAIRS; one line of JSON.

sdpa attention, bf16 weights and fused AdamW on them (TRL's fastest and smallest; there are no fp32 master weights,
which dpo-dist keeps), Liger's kernels where it is installed, the largest micro-batch of 1, 2, 4, ... pairs that fits,
gradient checkpointing only where one pair does not fit without it. Seconds are medians of optimizer steps after the
first two. What precomputing the reference takes is not counted.
"""
from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

STEPS, LEFT_OUT = 6, 2


class TokenRows(DPOTrainer):
    """The rows are token ids already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds, self.losses, self._began = [], [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self._began = now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(now() - self._began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(model: Path, rows: Path, way: str, pairs: int) -> None:
    """Larger micro-batches, as long as they fit and are faster; of all that ran, the fastest."""
    best: dict[str, Any] | None = None
    for checkpointing in (False, True):
        at_once = 1
        while at_once <= pairs and not (best and best["checkpointing"] != checkpointing):
            try:
                found = measure(model, rows, way, pairs, at_once, checkpointing)
            except torch.OutOfMemoryError:
                break
            finally:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if best is not None and found["step_seconds"] > 0.98 * best["step_seconds"]:
                break
            best, at_once = found, 2 * at_once
    print(json.dumps(best or {"out_of_memory": True}))


def measure(folder: Path, rows: Path, way: str, pairs: int, at_once: int, checkpointing: bool) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    data = Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    words = {f"t{i}": i for i in range(16)}
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")),
                                        pad_token="t0", eos_token="t1", bos_token="t2", unk_token="t3")
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output, max_steps=STEPS, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=pairs // at_once, learning_rate=5e-7, lr_scheduler_type="constant",
            report_to=[], logging_steps=1, save_strategy="no", use_cpu=not on_gpu, max_length=None, bf16=on_gpu,
            max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True, optim="adamw_torch_fused",
            gradient_checkpointing=checkpointing, precompute_ref_log_probs=way == "precomputed",
            use_liger_kernel=on_gpu and liger(),
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, beta=0.1, seed=0,
            dataloader_pin_memory=on_gpu)
        trainer = TokenRows(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
        trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(trainer.train_dataset)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = clock.seconds[LEFT_OUT:]
    return {"step_seconds": round(statistics.median(seconds), 4), "first_loss": clock.losses[0],
            "pairs_at_once": at_once, "checkpointing": checkpointing, "liger": on_gpu and liger(),
            "weights": str(dtype), "optimizer_state": str(dtype),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None}


def liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
