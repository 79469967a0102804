"""Each recipe of conf/experiment/ trains: a tiny model of its architecture, under a chat template like its family's, on
rows like those of its data; only paths, sizes and the number of steps are set besides."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BITSANDBYTES, dpo_dist, metrics, packages_of
from made_tokenizers import CHATML, LLAMA3, bpe
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Olmo3Config, PretrainedConfig, SmolLM3Config

pytestmark = pytest.mark.distributed

SHAPE: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
                         "pad_token_id": 1, "initializer_range": 0.2}
LLAMA, MISTRAL = LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=16)
OLMO3 = Olmo3Config(**SHAPE, sliding_window=16, max_position_embeddings=65536)
SMOLLM2, SMOLLM3 = LlamaConfig(**SHAPE, tie_word_embeddings=True), SmolLM3Config(**SHAPE)

TULU = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- if not loop.last or m.role != 'assistant' %}{{ '\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
ZEPHYR = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
SYSTEM = """{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}{%- endif %}"""
# OLMo 3's last answer ends with the tokenizer's EOS, and its Think's generation prompt opens the thinking
OLMO_INSTRUCT = SYSTEM + """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- if loop.last and m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
OLMO_THINK = OLMO_INSTRUCT.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>' }}")
# what is between turns of SmolLM3 depends on enable_thinking, which each row sets
SMOL3 = """{%- set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' + mode + '<|im_end|>\\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and mode == '/no_think' %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}
{{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if mode == '/no_think' %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}{% endif %}"""


def row(i: int, thinking: str = "", **more: Any) -> dict[str, Any]:
    """A row as the hub sets have them: the question as text, and two whole conversations; every third of two turns."""
    before = [{"role": "user", "content": "Hello there."},
              {"role": "assistant", "content": f"{thinking}Hello!"}] if i % 3 == 2 else []
    question = {"role": "user", "content": f"What is {i} and {i}?"}
    chosen, rejected = ({"role": "assistant", "content": thinking + text} for text in
                        (f"It is {2 * i}, I think.", "No. " * (1 + i % 4) + "It is five!"))
    return {"prompt": question["content"], "chosen": [*before, question, chosen],
            "rejected": [*before, question, rejected], **more}


def answers(i: int) -> dict[str, Any]:
    return row(i, id=f"{i}", source="made up")


def thoughts(i: int) -> dict[str, Any]:
    return row(i, f"<think>{i} twice.</think>")


def both(i: int) -> dict[str, Any]:
    """As smoltalk2's two splits: with thinking, and without."""
    return row(i, *(["<think>\nTwice.\n</think>\n"] if i % 2 else []), chat_template_kwargs={
        "custom_instructions": "", "enable_thinking": bool(i % 2), "python_tools": [], "xml_tools": []})


# recipe: (architecture, template, rows, peak, share of it at each of four steps of which the first warms up)
LINEAR, COSINE, COSINE_TO_A_TENTH = [1, 1, 2 / 3, 1 / 3], [1, 1, 0.75, 0.25], [1, 1, 0.775, 0.325]
RECIPES: dict[str, tuple[PretrainedConfig, str, Callable[[int], dict[str, Any]], float, list[float]]] = {
    "tulu3_8b": (LLAMA, TULU, answers, 5e-7, LINEAR),
    "tulu3_70b": (LLAMA, TULU, answers, 2e-7, LINEAR),
    "tulu3_405b": (LLAMA, TULU, answers, 2e-7, LINEAR),
    "olmo3_7b_instruct": (OLMO3, OLMO_INSTRUCT, answers, 1e-6, LINEAR),
    "olmo3_7b_think": (OLMO3, OLMO_THINK, thoughts, 8e-8, LINEAR),
    "olmo3_32b_instruct": (OLMO3, OLMO_INSTRUCT, answers, 1e-6, LINEAR),
    "olmo3_32b_think": (OLMO3, OLMO_INSTRUCT, thoughts, 7e-8, LINEAR),
    "zephyr_7b": (MISTRAL, ZEPHYR, answers, 5e-7, COSINE),
    "smollm2_1_7b": (SMOLLM2, SYSTEM + CHATML, answers, 1e-6, COSINE),
    "smollm3_3b": (SMOLLM3, SMOL3, both, 1e-6, COSINE_TO_A_TENTH),
    "simpo_llama3_8b": (LLAMA, LLAMA3, answers, 1e-6, COSINE),
}
LOSS = {"tulu": ("sigmoid_norm", 5.0), "olmo": ("sigmoid_norm", 5.0), "zeph": ("sigmoid", 0.01),
        "smollm2": ("sigmoid", 0.5), "smollm3": ("apo_zero", 0.05), "simp": ("simpo", 2.5)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_with_its_loss_and_schedule(name: str, tmp_path: Path):
    architecture, template, make, peak, shares = RECIPES[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path / "m")
    bpe(template).save_pretrained(tmp_path / "m")
    equal = answers(0) | {"rejected": answers(0)["chosen"]}
    for split, numbers in (("train", range(12)), ("test", range(20, 24))):
        rows = [make(i) for i in numbers] + [equal]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    held_out = ["data.eval=[{path: %s, format: messages}]" % (tmp_path / "test.jsonl")] * (
        name in ("zephyr_7b", "smollm2_1_7b", "simpo_llama3_8b"))
    dpo_dist("train", f"experiment={name}", f"model.path={tmp_path / 'm'}", "run.offline=true", "cluster.device=cpu",
             "cluster.procs_per_node=1", "data.train=[{path: %s, format: messages}]" % (tmp_path / "train.jsonl"),
             *held_out, "train.pairs_per_step=4", "train.max_steps=4", f"data.cache_dir={tmp_path / 'tokens'}",
             f"reference.cache_dir={tmp_path / 'reference'}", f"run.dir={tmp_path / 'run'}")

    written = json.loads((tmp_path / "run" / "run.json").read_text())
    loss = next(value for prefix, value in LOSS.items() if name.startswith(prefix))
    assert (written["config"]["loss"]["name"], written["config"]["loss"]["beta"]) == loss
    assert written["passport"]["train_pairs"]["count"] == 12, "all but the row of equal answers"
    assert written["passport"]["attention"] == "branch" and written["passport"]["dtype"] == "bfloat16"
    steps = metrics(tmp_path / "run")
    assert [step["lr"] for step in steps] == pytest.approx([peak * share for share in shares])
    assert len(metrics(tmp_path / "run", "eval")) == 2 * len(held_out)
    assert (tmp_path / "run" / "DONE").exists() and all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize(("name", "peak", "shares"), [("lora", 1e-5, LINEAR), ("qlora", 5e-6, COSINE)])
def test_adapters_train_beside_the_policy_without_them(name: str, peak: float, shares: list[float], tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}            # whole blocks, should weights be quantized
    AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, **sizes})).save_pretrained(tmp_path / "m")
    bpe(LLAMA3).save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(answers(i)) + "\n" for i in range(12)))
    with packages_of(*([BITSANDBYTES] if name == "qlora" else [])):
        dpo_dist("train", f"experiment={name}", f"model.path={tmp_path / 'm'}", f"data.train={tmp_path / 'rows.jsonl'}",
                 "cluster.device=cpu", "cluster.procs_per_node=1", "train.pairs_per_step=4", "train.max_steps=4",
                 f"data.cache_dir={tmp_path / 'tokens'}", f"reference.cache_dir={tmp_path / 'reference'}",
                 f"run.dir={tmp_path / 'run'}")
    assert [step["lr"] for step in metrics(tmp_path / "run")] == pytest.approx([peak * share for share in shares])
    assert (tmp_path / "run" / "DONE").exists()
