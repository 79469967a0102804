"""Tokenizers with chat templates like those in use, built on the spot, and what tests of tokenizing need besides."""
from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.formats import DataRow
from dpo_dist.data.tokenize import Dropped, PairTokenizer, truncate
from dpo_dist.types import PreferenceRow, TokenizedPair

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|eom|>"]
TEXT = ["Hello there, what is two and two?", "It is four, I think.", "user assistant system think\n\n",
        "No. It is five!"]

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
QWEN3 = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last and m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PHI3 = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
NO_END = """{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
SPACED = """{%- for m in messages %}{{ m.role + ': ' + m.content | trim + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"""
OPENS_THINK = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
ENDS_OTHERWISE = CHATML.replace("m.content + '<|im_end|>\\n'", "m.content + (m.tool_calls | tojson + '<|eom|>' "
                                                               "if m.tool_calls else '<|im_end|>\\n')")


def make_tokenize(tokenizer: PreTrainedTokenizerFast | None,
                  given: DataConfig) -> Callable[[DataRow], TokenizedPair | Dropped]:
    """A function from a row to its pair, truncated."""
    encoder = PairTokenizer.of(tokenizer, given)
    return lambda row: truncate(encoder.encode([row])[0], given)


def bpe(template: str | dict[str, str] | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template,
                                   additional_special_tokens=SPECIAL[2:])


def sentencepiece_like(template: str | dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put before any text."""
    core = Tokenizer(models.BPE(byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    core.train_from_iterator([t.replace(" ", "▁") for t in TEXT],
                             trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + bytes_, show_progress=False))
    core = Tokenizer.from_str(json.dumps({**json.loads(core.to_str()), "added_tokens": [
        t for t in json.loads(core.to_str())["added_tokens"] if t["content"] not in bytes_]}))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template,
                                   additional_special_tokens=SPECIAL[2:])


def config(**changes: object) -> DataConfig:
    defaults = DataConfig(train=(), eval=(), eval_fraction=0.0, max_length=1000, truncation="drop", on_bad_row="error",
                          on_missing_content="error", train_on="assistant", chat_template_kwargs=None,
                          chat_template=None, group_by_prompt=False, cache_dir="unused")
    return DataConfig(**{**vars(defaults), **changes})


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def chat(chosen: str = "It is four.", prompt: str = "Two and two?", rejected: str = "Five!") -> PreferenceRow:
    return PreferenceRow((user(prompt),), (assistant(chosen),), (assistant(rejected),), "rows.jsonl:1")


def texts(tokenizer: PreTrainedTokenizerFast, row: PreferenceRow, **changes: object) -> tuple[str, str, str]:
    """What the pair's ids say when they are decoded again, special tokens included."""
    pair = make_tokenize(tokenizer, config(**changes))(row)
    assert isinstance(pair, TokenizedPair), pair
    prompt, chosen, rejected = (tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt, chosen, rejected
