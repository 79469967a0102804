"""Some steps of TRL's own trainer in one process, one thread; prints a line of JSON: run_trl.py WHAT FOLDER KIND STEPS.

WHAT: dpo (reference forward at every step), dpo_precomputed, sft (both completions of each pair as rows).
"""
from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from workload import PAIRS_PER_STEP


class TokenRows(DPOTrainer):
    """The rows are token ids already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds, self.losses, self._began = [], [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def main(what: str, folder: Path, kind: str, steps: int) -> None:
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = _any_tokenizer()
    per_step = PAIRS_PER_STEP[kind]
    common = {"output_dir": str(folder / "trl"), "max_steps": steps, "learning_rate": 1e-4,
              "lr_scheduler_type": "constant", "report_to": [], "logging_steps": 1, "save_strategy": "no",
              "use_cpu": True, "max_length": None, "bf16": False, "max_grad_norm": 1.0, "weight_decay": 0.0,
              "disable_tqdm": True, "dataloader_pin_memory": False, "gradient_checkpointing": False,
              "optim": "adamw_torch", "seed": 0}
    clock = Clock()
    if what == "sft":
        data = Dataset.from_list([_supervised(row, side) for row in rows for side in ("chosen_ids", "rejected_ids")])
        config = SFTConfig(per_device_train_batch_size=2 * per_step, dataset_kwargs={"skip_prepare_dataset": True},
                           remove_unused_columns=False, **common)
        trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer,
                             callbacks=[clock])
    else:
        config = DPOConfig(per_device_train_batch_size=per_step, beta=0.1,
                           precompute_ref_log_probs=what == "dpo_precomputed", **common)
        trainer = TokenRows(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                            callbacks=[clock])
    trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses, "peak_mib": peak}))


def _supervised(row: dict, side: str) -> dict:
    ids = row["prompt_ids"] + row[side]
    return {"input_ids": ids, "labels": [-100] * len(row["prompt_ids"]) + row[side]}


def _any_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(4096)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")), pad_token="t0",
                                   eos_token="t1", bos_token="t2", unk_token="t3")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
