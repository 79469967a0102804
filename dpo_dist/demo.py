"""`make demo`: the whole way on a set whose truth is known, offline, in minutes: python -m dpo_dist.demo [folder] [overrides].

The rule to learn: answer in the language of the question. A tiny chat model is first supervised on answers in both languages alike,
so that it breaks the rule half of the time; DPO on pairs (right language, wrong language) must then teach it, on prompts never seen.
"""
from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from dpo_dist.launcher.cli import main as dpo_dist
from dpo_dist.terminal import Terminal

NAMES = ("Anna Bruno Clara David Emma Felix Greta Hugo Ines Jonas Karla Leo Mara Nico Olga Paul Rosa Simon Tina Viktor "
         "Wanda Xaver Yara Zoe Alma Boris Cleo Dora Emil Fritz Gina Hans Ida Jakob Kira Lars Mona Nora Otto Pia").split()
QUESTIONS = {"en": ("Where is {}?", "Have you seen {}?", "Do you know where {} went?", "I am looking for {}.", "Can you find {} for me?"),
             "fr": ("Où est {} ?", "As-tu vu {} ?", "Sais-tu où est {} ?", "Je cherche {}.", "Peux-tu trouver {} ?")}
ANSWERS = {"en": "Look in the {}.", "fr": "Cherche dans {}."}
PLACES = {"en": ("garden", "kitchen", "library", "station", "park"),
          "fr": ("le jardin", "la cuisine", "la bibliothèque", "la gare", "le parc")}
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HELD_OUT_SHARE = 0.2


def main(folder: Path, overrides: list[str]) -> int:
    terminal = Terminal.start(str(folder / "demo.log"), is_main=True, capture=False)
    _quiet()
    terminal.say("1/4  data and a tiny model")
    held_out = write_data(folder)
    write_model(folder / "base", (folder / "sft.jsonl").read_text())
    common = ["data.eval=[{path: %s}]" % (folder / "held_out.jsonl"), "cluster.device=cpu", "model.dtype=fp32", "data.max_length=128",
              "cluster.procs_per_node=2", "data.cache_dir=%s" % (folder / "tokens"), *overrides]

    terminal.say("2/4  supervision (loss=sft): the model learns to answer, in either language")
    code = dpo_dist(["train", "loss=sft", f"model.path={folder / 'base'}", "data.train=[{path: %s}]" % (folder / "sft.jsonl"), "train.epochs=4",
                     "train.pairs_per_step=16", "optim.lr=3e-3", f"run.dir={folder / 'sft'}", *common])
    if code:
        return code
    terminal.say("3/4  DPO (2 processes, ZeRO-3): reference scored once, policy trained, evaluated, exported")
    code = dpo_dist(["run", f"model.path={folder / 'sft' / 'model'}", "data.train=[{path: %s}]" % (folder / "pairs.jsonl"), "train.epochs=2",
                     "train.pairs_per_step=16", "optim.lr=5e-4", "loss.beta=0.1", f"run.dir={folder / 'dpo'}",
                     f"reference.cache_dir={folder / 'reference'}", *common])
    if code:
        return code
    terminal.say(f"4/4  answers sampled to {len(held_out)} held-out prompts")
    report(terminal, folder, held_out)
    return 0


def report(terminal: Terminal, folder: Path, held_out: list[tuple[str, str]]) -> None:
    """The table before/after, a few answers, and what to try next."""
    rows = [json.loads(line) for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = (row for row in rows if row["split"] == "eval")
    answers = {name: sample(folder / name / "model", [p for _, p in held_out]) for name in ("sft", "dpo")}
    share = {name: sum(obeys(a, language) for a, (language, _) in zip(given, held_out, strict=True)) / len(given)
             for name, given in answers.items()}
    terminal.table("before and after DPO, on prompts that were never trained on", ["", "before", "after"], [
        ["reward accuracy", f"{before['rewards/accuracies']:.3f}", f"{after['rewards/accuracies']:.3f}"],
        ["reward margin", f"{before['rewards/margins']:.3f}", f"{after['rewards/margins']:.3f}"],
        ["loss", f"{before['loss']:.4f}", f"{after['loss']:.4f}"],
        ["sampled answers that obey the rule", f"{share['sft']:.0%}", f"{share['dpo']:.0%}"]])
    terminal.table("sampled answers", ["prompt", "before", "after"],
                   [[p, a, b] for (_, p), a, b in list(zip(held_out, answers["sft"], answers["dpo"], strict=True))[:4]])
    (folder / "result.json").write_text(json.dumps({"accuracy": after["rewards/accuracies"], "obey_before": share["sft"], "obey_after": share["dpo"]}))
    terminal.say("On your own data:\n"
                 "  dpo-dist run model.path=MODEL 'data.train=[{path: pairs.jsonl}]' data.eval_fraction=0.05\n"
                 "  dpo-dist run --help                  all keys\n"
                 "  dpo-dist run ... loss=ipo loss.beta=0.3   the reference is not scored again")


# ----------------------------------------------------------------------------------------------------------------- the truth


def obeys(answer: str, language: str) -> bool:
    """The rule: a whole answer, in the language of the question."""
    return answer.strip() in {ANSWERS[language].format(place) for place in PLACES[language]}


def write_data(folder: Path) -> list[tuple[str, str]]:
    """Writes sft.jsonl, pairs.jsonl and held_out.jsonl; the held-out prompts as (language, prompt)."""
    folder.mkdir(parents=True, exist_ok=True)
    r = random.Random(0)
    prompts = [(language, q.format(name)) for language, questions in QUESTIONS.items() for q in questions for name in NAMES]
    r.shuffle(prompts)
    cut = int(HELD_OUT_SHARE * len(prompts))
    held_out, seen = prompts[:cut], prompts[cut:]

    def answer(language: str) -> str:
        return ANSWERS[language].format(r.choice(PLACES[language]))

    def pair(language: str, prompt: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": answer(language), "rejected": answer({"en": "fr", "fr": "en"}[language])}

    supervised = []
    for language, prompt in seen:
        row = pair(language, prompt)
        supervised += [row, {"prompt": prompt, "chosen": row["rejected"], "rejected": row["chosen"]}]
    for file, rows in (("sft", supervised), ("pairs", [pair(*p) for p in seen]), ("held_out", [pair(*p) for p in held_out])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return held_out


def write_model(folder: Path, text: str) -> None:
    """A random Llama of half a million parameters and a byte-level BPE tokenizer trained on the text, with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [word for row in map(json.loads, text.splitlines()) for word in row.values()]
    bpe.train_from_iterator([*words, "user assistant\n"], trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)


def sample(folder: Path, prompts: list[str]) -> list[str]:
    """One answer at temperature 1 to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chats = [[{"role": "user", "content": p}] for p in prompts]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True)
    torch.manual_seed(0)
    out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def _quiet() -> None:
    """The demo's own process loads models too: keep the libraries to themselves."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["DS_ACCELERATOR"] = "cpu"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    words = sys.argv[1:]
    where = words.pop(0) if words and "=" not in words[0] else "runs/demo"
    sys.exit(main(Path(where), words))
