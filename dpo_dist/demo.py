"""`make demo`: a whole run on data whose truth is known, offline, in minutes: python -m dpo_dist.demo [folder]
[overrides].

The rule to learn: answer in the tone of the question: a polite one is answered with "madam", a casual one with "mate".
A tiny chat model is first supervised on answers that end in either at random; DPO on pairs that differ in that word
must then teach it the rule, on prompts that it never saw. The loss is rpo, DPO plus the likelihood of the chosen
answers: a model this small would otherwise widen its margins by forgetting how to speak.
"""
from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from dpo_dist.launcher.cli import main as dpo_dist
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal

QUESTIONS = {
    "polite": ("Excuse me, where is the {}, please?", "Could you tell me where the {} is?",
               "Would you kindly show me the {}?", "I beg your pardon, which way to the {}?"),
    "casual": ("Hey, where's the {}?", "Yo, which way to the {}?", "Gotta find the {}, where is it?",
               "Any idea where the {} is, dude?"),
}
PLACES = ("kitchen", "garden", "library", "station", "park", "office", "lift", "museum", "market", "harbour", "tower",
          "bridge", "school", "theatre", "bakery", "pharmacy", "castle", "airport", "hotel", "beach", "stadium",
          "church", "cinema", "garage", "gallery")
DIRECTIONS = ("Straight on", "Second door on the left", "Up the stairs", "Turn right at the corner", "Just behind you",
              "Across the street")
ENDINGS = {"polite": "madam", "casual": "mate"}
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HELD_OUT_SHARE = 0.2
SAMPLES_A_PROMPT = 4


def main(folder: Path, overrides: list[str]) -> int:
    terminal = Terminal.start(str(folder / "demo.log"), is_main=True, capture=False)
    _quiet()
    terminal.say("1/4  data and a tiny model")
    held_out = write_inputs(folder)
    common = [f"data.eval=[{{path: {folder / 'held_out.jsonl'}}}]", "cluster.device=cpu", "model.dtype=fp32",
              "data.max_length=128", "cluster.procs_per_node=2", f"data.cache_dir={folder / 'tokens'}", *overrides]

    terminal.say("2/4  supervision (loss=sft): the model learns to answer, in either tone")
    # in one process: so small a model is trained faster so, and ZeRO-3 is for the next step to show
    code = dpo_dist(["train", "loss=sft", f"model.path={folder / 'base'}",
                     f"data.train=[{{path: {folder / 'sft.jsonl'}}}]", "train.epochs=6", "train.pairs_per_step=16",
                     "optim.lr=2e-3", f"run.dir={folder / 'sft'}", *common, "cluster.procs_per_node=1", "zero=none"])
    if code:
        return code
    terminal.say("3/4  DPO (2 processes, ZeRO-3): reference scored once, policy trained, evaluated, exported")
    code = dpo_dist(["run", "loss=rpo", f"model.path={folder / 'sft' / 'model'}",
                     f"data.train=[{{path: {folder / 'pairs.jsonl'}}}]", "train.epochs=4", "train.pairs_per_step=16",
                     "optim.lr=5e-4", "loss.beta=0.5", f"run.dir={folder / 'dpo'}",
                     "eval.samples=8", "eval.max_new_tokens=24",
                     f"reference.cache_dir={folder / 'reference'}", *common])
    if code:
        return code
    terminal.say(f"4/4  {SAMPLES_A_PROMPT} answers sampled to each of {len(held_out)} held-out prompts")
    report(terminal, folder, held_out)
    return 0


def report(terminal: Terminal, folder: Path, held_out: list[tuple[str, str]]) -> None:
    """The table before/after, a few answers, and what to try next."""
    before, *_, after = RunDir(folder / "dpo").rows("eval")
    questions = held_out * SAMPLES_A_PROMPT
    answers = {name: sample(RunDir(folder / name).model, [p for _, p in questions]) for name in ("sft", "dpo")}
    share = {name: sum(obeys(a, tone) for a, (tone, _) in zip(given, questions, strict=True)) / len(given)
             for name, given in answers.items()}
    terminal.table("before and after DPO, on prompts that were never trained on", ["", "before", "after"], [
        ["reward accuracy", f"{before['rewards/accuracies']:.3f}", f"{after['rewards/accuracies']:.3f}"],
        ["reward margin", f"{before['rewards/margins']:.3f}", f"{after['rewards/margins']:.3f}"],
        ["loss", f"{before['loss']:.4f}", f"{after['loss']:.4f}"],
        ["sampled answers that obey the rule", f"{share['sft']:.0%}", f"{share['dpo']:.0%}"]])
    terminal.table("sampled answers", ["prompt", "before", "after"],
                   [[p, a, b] for (_, p), a, b in list(zip(questions, answers["sft"], answers["dpo"],
                                                           strict=True))[:4]])
    result = {"accuracy": after["rewards/accuracies"], "obey_before": share["sft"], "obey_after": share["dpo"]}
    (folder / "result.json").write_text(json.dumps(result))
    terminal.say("On your own data:\n"
                 "  dpo-dist run model.path=MODEL 'data.train=[{path: pairs.jsonl}]' data.eval_fraction=0.05\n"
                 "  dpo-dist run --help                  all keys\n"
                 "  dpo-dist run ... loss=ipo loss.beta=0.3   the reference is not scored again")


# ------------------------------------------------------------------------------------------------------------ the truth


def obeys(answer: str, tone: str) -> bool:
    """The rule: a whole answer, with the ending that belongs to the question's tone."""
    direction, _, ending = answer.strip().partition(", ")
    return direction in DIRECTIONS and ending == ENDINGS[tone]


def write_inputs(folder: Path) -> list[tuple[str, str]]:
    """Writes the data and the model (base/), also for docker/compose.yaml; the held-out prompts as (tone, prompt)."""
    held_out = write_data(folder)
    write_model(folder / "base", (folder / "sft.jsonl").read_text())
    return held_out


def write_data(folder: Path) -> list[tuple[str, str]]:
    """Writes sft.jsonl, pairs.jsonl and held_out.jsonl; the held-out prompts as (tone, prompt)."""
    folder.mkdir(parents=True, exist_ok=True)
    r = random.Random(0)
    prompts = [(tone, question.format(place)) for tone, questions in QUESTIONS.items()
               for question in questions for place in PLACES]
    r.shuffle(prompts)
    cut = int(HELD_OUT_SHARE * len(prompts))
    held_out, seen = prompts[:cut], prompts[cut:]

    def pair(tone: str, prompt: str) -> dict[str, str]:
        direction, other = r.choice(DIRECTIONS), {"polite": "casual", "casual": "polite"}[tone]
        return {"prompt": prompt, "chosen": f"{direction}, {ENDINGS[tone]}",
                "rejected": f"{direction}, {ENDINGS[other]}"}

    pairs = [pair(*p) for p in seen for _ in range(2)]
    supervised = [*pairs, *({"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
                            for row in pairs)]
    for file, rows in (("sft", supervised), ("pairs", pairs), ("held_out", [pair(*p) for p in held_out])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return held_out


def write_model(folder: Path, text: str) -> None:
    """A random Llama of half a million parameters, and a byte-level BPE tokenizer with a chat template, trained on the
    text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [word for row in map(json.loads, text.splitlines()) for word in row.values()]
    bpe.train_from_iterator([*words, "user assistant\n"], trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)


def sample(folder: Path, prompts: list[str]) -> list[str]:
    """One answer at temperature 1 to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    chats = [[{"role": "user", "content": p}] for p in prompts]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True,
                                           padding=True)
    torch.manual_seed(0)
    out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=24,
                         pad_token_id=tokenizer.pad_token_id)
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
