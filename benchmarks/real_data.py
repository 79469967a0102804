"""Two real preference sets, the whole way, from nothing: python benchmarks/real_data.py DATA_FOLDER [OUT_FOLDER].

For each set: a byte-level BPE tokenizer trained on its text, a Llama of about four million parameters supervised on the
chosen answers, then DPO in 2 processes under ZeRO-3, evaluated on prompts that neither saw, exported, loaded back and
evaluated again. Results go to benchmarks/results/real_data.json, as they come out.
"""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.rows import read_rows
from dpo_dist.demo import TEMPLATE
from dpo_dist.launcher.cli import main as dpo_dist

SETS = {"dpo_en_demo.json": "sharegpt", "hh_harmless_test.jsonl.gz": "hh"}
RESULTS = Path(__file__).parent / "results" / "real_data.json"


def main(data: Path, out: Path) -> None:
    results = {name: align(data / name, form, out / name.split(".")[0]) for name, form in SETS.items()
               if (data / name).is_file()}
    RESULTS.parent.mkdir(exist_ok=True)
    written = {"machine": f"{torch.get_num_threads()} CPU cores, fp32", "sets": results}
    RESULTS.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(results, indent=2))


def align(path: Path, form: str, folder: Path) -> dict[str, object]:
    began = time.monotonic()
    parameters = write_model(folder / "base", path, form)
    common = [f"data.train=[{{path: {path}, format: {form}}}]", "data.eval_fraction=0.1", "data.max_length=2048",
              "data.on_bad_row=skip", f"data.cache_dir={folder / 'tokens'}",
              f"reference.cache_dir={folder / 'reference'}", "cluster.device=cpu", "model.dtype=fp32",
              "cluster.procs_per_node=2", "train.pairs_per_step=16", "train.tokens_per_microbatch=4096"]
    step("train", "loss=sft", f"model.path={folder / 'base'}", "train.epochs=3", "optim.lr=2e-3",
         f"run.dir={folder / 'sft'}", *common)
    supervised = time.monotonic()
    step("run", f"model.path={folder / 'sft' / 'model'}", "train.epochs=2", "optim.lr=2e-5", "loss.beta=0.1",
         f"run.dir={folder / 'dpo'}", *common)
    aligned = time.monotonic()
    step("eval", f"model.path={folder / 'dpo' / 'model'}", f"reference.path={folder / 'sft' / 'model'}",
         "loss.beta=0.1", f"run.dir={folder / 'loaded_back'}", *common)
    rows = [json.loads(line) for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()]
    held_out = [{k: round(v, 4) for k, v in row.items() if k not in ("step", "split")} for row in rows
                if row["split"] == "eval"]
    passport = json.loads((folder / "dpo" / "run.json").read_text())["passport"]
    back = json.loads((folder / "loaded_back" / "eval.json").read_text())
    return {"parameters": parameters, "data": (folder / "dpo" / "data.txt").read_text().replace(f"{path.parent}/",
                                                                                                "").splitlines(),
            "train_pairs": passport["train_pairs"]["count"], "held_out_pairs": passport["eval_pairs"]["count"],
            "before": held_out[0], "after": held_out[-1],
            "after_loaded_back": {k: round(back[k], 4) for k in held_out[-1]},
            "seconds": {"supervision": round(supervised - began), "dpo": round(aligned - supervised)}}


def step(*words: str) -> None:
    code = dpo_dist(list(words))
    if code:
        sys.exit(code)


def write_model(folder: Path, path: Path, form: str) -> int:
    """Writes tokenizer and random model; its number of parameters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rows, _ = read_rows(DatasetConfig(str(path), form), "skip")          # type: ignore[arg-type]
    texts = (m["content"] for row in rows for part in (row.prompt, row.chosen, row.rejected) for m in part)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096,
                                                       special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                       show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                                         tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
                                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/real_data"))
