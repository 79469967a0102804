"""Rows a second from a file of chats to token ids, on 1 and 2 cores, beside TRL's preparation: tokenizing.py [ROUNDS
[ROWS]].

Each figure is a process of its own that may use so many cores: ours starts as many processes as it likes there, TRL's
DPOTrainer is told to with dataset_num_proc. The two alternate; figures are medians over rounds, and ratios those of one
round. What is timed on both sides is all from the file to the ids on disk, without the imports. Results:
benchmarks/results/tokenizing.json.
"""
from __future__ import annotations

import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
CORES = (1, 2)
WORDS = 40_000


# --------------------------------------------------------------------------------------------- rows and their tokenizer


def write_rows(path: Path, n: int) -> None:
    """Chats of one to three questions, about 900 tokens a row, from 50 to 10,000; words as often as in a language."""
    r = random.Random(0)
    syllables = ["ka", "to", "ri", "men", "sul", "pra", "est", "ing", "or", "al", "ther", "on", "is", "ve", "qu", "lo"]
    words = sorted({"".join(r.choice(syllables) for _ in range(r.randint(1, 4))) for _ in range(WORDS)})
    r.shuffle(words)
    often = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))
    text = r.choices(words, cum_weights=often, k=300_000)
    text = [word + r.choice([".", ",", "!\n", "?\n\n"]) if at % 13 == 12 else word for at, word in enumerate(text)]

    def said(role: str, mean_words: float) -> dict[str, str]:
        length = min(3000, max(3, int(r.lognormvariate(-0.25, 0.7) * mean_words)))
        start = r.randrange(len(text) - length)
        return {"role": role, "content": " ".join(text[start:start + length])}

    with path.open("w") as file:
        for _ in range(n):
            prompt = [said(role, 95) for _ in range(r.choice([0, 0, 1, 2])) for role in ("user", "assistant")]
            row = {"prompt": [*prompt, said("user", 140)], "chosen": [said("assistant", 235)],
                   "rejected": [said("assistant", 235)]}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path, rows: Path) -> None:
    """A byte-level BPE tokenizer with 16,000 tokens, trained on the rows, and a tiny model, which TRL asks for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dpo_dist.demo import TEMPLATE

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with rows.open() as file:
        texts = [json.loads(line)["chosen"][0]["content"] for line in itertools.islice(file, 1000)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                            chat_template=TEMPLATE).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe.get_vocab()), hidden_size=8, intermediate_size=8,
                                 num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------- the two sides


def ours(folder: Path, scratch: Path, cores: int) -> int:
    """As `dpo-dist train` does it; the number of pairs."""
    from dpo_dist.config.compose import compose
    from dpo_dist.run.tokenizing import tokenized_pairs
    from dpo_dist.runtime.terminal import Terminal
    from dpo_dist.runtime.world import World

    config = compose([f"model.path={folder}", "cluster.device=cpu", f"data.train={folder / 'rows.jsonl'}",
                      f"data.cache_dir={scratch}", "data.max_length=100000"])
    world, terminal = World.start(config.cluster), Terminal.start(str(scratch / "log"), False, capture=False)
    return len(timed(lambda: tokenized_pairs(config.data, folder, world, terminal))[0])


def trl(folder: Path, scratch: Path, cores: int) -> int:
    """As a script does it that loads a JSON file and makes a DPOTrainer; the number of pairs."""
    os.environ["HF_DATASETS_CACHE"] = str(scratch)             # read when `datasets` is imported
    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
            loaded = timed(lambda: load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"))
            return timed(lambda: super(Timed, self)._prepare_dataset(loaded, *args, **kwargs))

    disable_progress_bars()
    first = load_dataset("json", data_files=str(folder / "first.jsonl"), split="train")
    config = DPOConfig(output_dir=str(scratch), use_cpu=True, bf16=False, report_to=[], max_length=None,
                       dataset_num_proc=cores)
    trainer = Timed(model=AutoModelForCausalLM.from_pretrained(folder), args=config, train_dataset=first,
                    processing_class=AutoTokenizer.from_pretrained(folder))
    return len(trainer.train_dataset)


seconds: list[float] = []
processor_seconds: list[float] = []                            # of this process and of those that it started


def timed(work):  # type: ignore[no-untyped-def]
    began, used = time.monotonic(), sum(os.times()[:4])
    result = work()
    seconds.append(time.monotonic() - began)
    processor_seconds.append(sum(os.times()[:4]) - used)
    return result


def one(side: str, folder: Path, cores: int) -> None:
    """Runs one side on so many cores and prints what it took."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with tempfile.TemporaryDirectory() as scratch:
        pairs = {"ours": ours, "TRL": trl}[side](folder, Path(scratch), cores)
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(json.dumps({"pairs": pairs, "rows_a_second": pairs / sum(seconds), "peak_mib": peak,
                      "rows_a_processor_second": pairs / sum(processor_seconds)}), flush=True)
    os._exit(0)                                                # gloo's threads abort an ordinary exit now and then


def main(rounds: int, rows: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", rows)
        with (folder / "rows.jsonl").open() as file:
            (folder / "first.jsonl").write_text(next(file))
        write_model(folder, folder / "rows.jsonl")
        found = [{f"{side}, {cores}": run(side, folder, cores, rows) for cores in CORES for side in ("ours", "TRL")}
                 for _ in range(rounds)]

    def medians(what: str) -> dict[str, int]:
        return {name: round(statistics.median(r[name][what] for r in found)) for name in found[0]}

    results = {
        "rows": rows, "rounds": rounds, "rows a second": medians("rows_a_second"),
        "rows a second of the processor": medians("rows_a_processor_second"),      # whatever else the machine does
        "ours / TRL": {str(cores): round(statistics.median(
            r[f"ours, {cores}"]["rows_a_second"] / r[f"TRL, {cores}"]["rows_a_second"] for r in found), 2)
            for cores in CORES},
        "peak MiB, of the largest process and the one that started it": medians("peak_mib")}
    (HERE / "results" / "tokenizing.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def run(side: str, folder: Path, cores: int, rows: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--one", side, str(folder), str(cores)], capture_output=True,
                          text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{side} on {cores} cores failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["pairs"] == rows, "every row is tokenized"
    print(side, cores, found, flush=True)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*(int(word) for word in (sys.argv[1:] + ["3", "10000"][len(sys.argv) - 1:])))
