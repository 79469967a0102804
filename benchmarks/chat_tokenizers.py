"""Tokenizers like those that real chat templates come with, trained on the spot.

What decides the tokens at the boundary between prompt and answer (white space, added tokens, beginning and end of text,
where generation stops) is as in the family; the vocabulary is small and of the given text.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

VOCABULARY = 6000
# how text is split into words before merging: as in Qwen 2 and 3, and nearly as in Llama 3, gpt-oss, GLM and DeepSeek
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
NAMED = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?think>|</?tool_call>|</?tool_response>|\[gMASK\]|<sop>|"
                   r"<(?:start|end)_of_turn>|<end_of_utterance>|<\|?turn\|?>|<\|?channel\|?>")
# are in the vocabulary as one token, but not marked as special, in Qwen 3, GLM 4.5, DeepSeek R1
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_response)>")


@dataclass(frozen=True)
class Family:
    """What a model's tokenizer_config.json and generation_config.json say beside the chat template."""

    bos: str | None
    eos: str
    stops: tuple[str, ...]                   # the tokens at which generation stops
    kind: str = "bytes"                      # bytes | gemma | llama2: how text becomes tokens
    adds_bos: bool = False                   # tokenizing plain text puts bos before it
    strips_right: tuple[str, ...] = ()       # tokens that swallow the white space after them
    in_parts: bool = False                   # whether its processor gives the template contents as lists of parts


CHATML = Family(None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"))
FAMILIES = {
    "qwen": CHATML,
    "nemotron": CHATML,
    "llama3": Family("<|begin_of_text|>", "<|eot_id|>", ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), adds_bos=True),
    "gemma4": Family("<bos>", "<eos>", ("<eos>", "<turn|>"), "gemma", adds_bos=True),
    "diffusion_gemma": Family("<bos>", "<eos>", ("<eos>", "<turn|>"), "gemma", adds_bos=True),
    "gemma": Family("<bos>", "<eos>", ("<eos>", "<end_of_turn>"), "gemma", adds_bos=True),
    "gptoss": Family("<|startoftext|>", "<|return|>", ("<|return|>", "<|call|>", "<|endoftext|>")),
    "deepseek": Family("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",), adds_bos=True),
    "glm4moe": Family(None, "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>")),
    "phi3": Family("<s>", "<|endoftext|>", ("<|endoftext|>", "<|end|>", "<|assistant|>"), "llama2",
                   strips_right=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "cohere": Family("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",), adds_bos=True),
    "lfm2": Family("<|startoftext|>", "<|im_end|>", ("<|im_end|>",), adds_bos=True),
    "llava": Family("<s>", "</s>", ("</s>",), "llama2", adds_bos=True, in_parts=True),
    "smolvlm": Family("<|im_start|>", "<end_of_utterance>", ("<end_of_utterance>",), in_parts=True),
    "idefics3": Family("<|begin_of_text|>", "<end_of_utterance>", ("<end_of_utterance>",), adds_bos=True,
                       in_parts=True),
    "muse_glimmer": Family("<|startoftext|>", "<|eot|>", ("<|eot|>",)),
}


def family_of(template: str) -> Family:
    """The family whose name begins the template's; the longest such name."""
    return FAMILIES[max((name for name in FAMILIES if template.startswith(name)), key=len)]


def trained(corpus: list[str]) -> dict[str, str]:
    """{Family.kind: a tokenizer of that kind as JSON, without added tokens}."""
    return {"bytes": _bytes(corpus).to_str(), "gemma": _sentencepiece(corpus, False).to_str(),
            "llama2": _sentencepiece(corpus, True).to_str()}


def write_tokenizer(folder: Path, template: str, text: str, cores: dict[str, str]) -> None:
    """Saves a tokenizer of the family that the template's name says, with the template's text in it."""
    family = family_of(template)
    names = [name for name in (family.bos, family.eos, *family.stops) if name] + NAMED.findall(text)
    added = [AddedToken(name, special=not NOT_SPECIAL.fullmatch(name), normalized=False,
                        rstrip=name in family.strips_right) for name in dict.fromkeys(names)]
    core = Tokenizer.from_str(cores[family.kind])
    core.add_special_tokens([token for token in added if token.special])
    core.add_tokens([token for token in added if not token.special])
    if family.adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=family.bos, eos_token=family.eos,
                                        chat_template=text)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(list(family.stops))).save_pretrained(folder)


def _bytes(corpus: Iterable[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return core


def _sentencepiece(corpus: Iterable[str], begins_with_space: bool) -> Tokenizer:
    """Spaces are written ▁ and merged like letters. Llama 2 and Phi 3 put one before each text between special tokens,
    and have line breaks as bytes only; Gemma puts none, and has tokens for runs of line breaks."""
    core = Tokenizer(models.BPE(byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = (text.replace("\n", " ") for text in corpus)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    breaks = [] if begins_with_space else ["\n" * n for n in range(1, 5)]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False,
                                                        special_tokens=["<unk>", *bytes_, *breaks]))
    plain = json.loads(core.to_str())        # byte tokens are for bytes, and not to be looked for in texts
    plain["added_tokens"] = [{**token, "special": token["content"] == "<unk>"} for token in plain["added_tokens"]
                             if token["content"] not in bytes_]
    plain["model"]["unk_token"] = "<unk>"
    core = Tokenizer.from_str(json.dumps(plain))
    core.pre_tokenizer = None if begins_with_space else pre_tokenizers.Split(" ", behavior="merged_with_previous")
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if begins_with_space else replace
    strip = [decoders.Strip(" ", left=1)] if begins_with_space else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core
