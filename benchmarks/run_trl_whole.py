"""A whole DPO run of TRL's own trainer, from a model's folder to an exported model: run_trl_whole.py SETTINGS.json.

Under torchrun it is DDP over gloo. Rows are token ids, in the order in which they are trained on; nothing of theirs is
left to prepare. Rank 0 writes the losses and the seconds of each step to SETTINGS' `report`.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from datasets import Dataset
from run_trl import Clock, TokenRows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig


def main(settings: dict) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    at_once = settings["pairs_at_once"]
    config = DPOConfig(
        output_dir=settings["out"], max_steps=settings["steps"], per_device_train_batch_size=at_once,
        gradient_accumulation_steps=settings["pairs_per_step"] // (at_once * processes), beta=settings["beta"],
        learning_rate=settings["lr"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", precompute_ref_log_probs=settings["precomputed"],
        per_device_eval_batch_size=at_once, max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None, report_to=[], logging_steps=1, save_strategy="no",
        ddp_find_unused_parameters=False if processes > 1 else None, disable_tqdm=True, dataloader_pin_memory=False,
        seed=0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32, attn_implementation="sdpa")
    rows = Dataset.from_json(settings["rows"])           # in a cache that all ranks see: TRL keeps log-probs beside it
    clock = Clock()
    trainer = TokenRows(model=model, args=config, train_dataset=rows,
                        eval_dataset=Dataset.from_json(settings["held_out"]) if settings["held_out"] else None,
                        processing_class=AutoTokenizer.from_pretrained(settings["model"]), callbacks=[clock])
    trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    if settings["held_out"]:
        trainer.evaluate()
    trainer.save_model(settings["out"])
    if trainer.is_world_process_zero():
        Path(settings["report"]).write_text(json.dumps({"losses": clock.losses, "step_seconds": clock.seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
