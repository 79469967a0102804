"""A model folder whose log-probs are known: a Llama that says each token as often as a text has it, whatever stands
before. Unlike a random model it finds gibberish unlikely; unlike a trained one it takes no time."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, texts: Sequence[str], template: str, vocabulary: int = 2000) -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on the texts, and a config.json beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([*texts, "user assistant\n"], trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0],
                                        bos_token=SPECIAL[0], chat_template=template)
    tokenizer.save_pretrained(folder)
    _config(LlamaConfig, len(tokenizer)).save_pretrained(folder)
    return tokenizer


def write_unigram_model(folder: Path, texts: Sequence[str], template: str) -> None:
    """The tokenizer, and a model of one layer that passes on the same vector whatever it reads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = write_tokenizer(folder, texts, template)
    count = torch.ones(len(tokenizer))                   # so that no token is impossible
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        count += torch.bincount(torch.tensor([*ids, tokenizer.eos_token_id]), minlength=len(tokenizer))
    model = LlamaForCausalLM(_config(LlamaConfig, len(tokenizer)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight[:, 0] = (count / count.sum()).log()
    model.save_pretrained(folder)


def _config(kind: Any, vocabulary: int) -> Any:
    return kind(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=0, eos_token_id=2, pad_token_id=0)
