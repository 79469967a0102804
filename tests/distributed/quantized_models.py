"""Run by test_quantized.py: which layers of an architecture are in 4 bits, and that exports have all of them whole, as
its files have them."""
from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.models.checkpointing import checkpoint_layers
from dpo_dist.models.load import ScoredModel, load_causal_lm, token_logps
from dpo_dist.models.lora import add_lora
from dpo_dist.models.quantized import is_four_bit
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.weights import merged_weights, write_shards
from dpo_dist.policy.make import make_policy
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.sizing.estimate import FOUR_BITS
from dpo_dist.types import TokenizedPair

BATCH = pack_pairs([TokenizedPair((3, 4, 5), (6, 7, 1), (8, 1), "a"),
                    TokenizedPair((9,), (10, 1), (11, 12, 13, 1), "b")], [0, 1], [1.0, 1.0])
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}
TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> ScoredModel:
    """A model in 4 bits with adapters that are not fresh."""
    model = ScoredModel(add_lora(load_causal_lm(folder, dtype, "branch", quantization="nf4"),
                                 LoraConfig(4, None, "all-linear"), 0), "branch")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model.train()


def four_bit_layers(model: ScoredModel) -> list[str]:
    return [name.removesuffix(".base_layer.weight") for name, p in model.causal.named_parameters() if is_four_bit(p)]


def exported(model: ScoredModel, source: Path, folder: Path) -> ScoredModel:
    """The export, loaded as any model is."""
    folder.mkdir()
    write_shards(folder, merged_weights(model), write=True)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return ScoredModel(load_causal_lm(folder, torch.float32, "branch"), "branch")


def error(one: ScoredModel, other: ScoredModel) -> float:
    return (token_logps(one.eval(), BATCH).logps - token_logps(other.eval(), BATCH).logps).abs().max().item()


def check_transposed_layers(folder: Path) -> None:
    """GPT-2's, whose files have (inputs, outputs), and whose head is the embedding."""
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4,
                                                         initializer_range=0.1)).save_pretrained(folder / "gpt2")
    model = adapted(folder / "gpt2")
    assert len(four_bit_layers(model)) == 8 and not is_four_bit(model.head.weight)
    assert error(model, exported(model, folder / "gpt2", folder / "gpt2-out")) < 1e-5


def check_text_and_image(folder: Path) -> None:
    """What sees images stays as it is, and so do layers whose rows are no whole blocks: here, 96 wide."""
    transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT), vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=1, image_token_id=63, boi_token_id=62, eoi_token_id=61)).save_pretrained(folder / "both")
    model = adapted(folder / "both")
    layers = four_bit_layers(model)
    assert len(layers) == 2 * 6 and not [name for name in layers if "vision" in name or "down_proj" in name], layers
    assert error(model, exported(model, folder / "both", folder / "both-out")) < 1e-5
    before, after = (load_file(folder / name / "model.safetensors") for name in ("both", "both-out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "vision" in name or "projector" in name)


def check_files_with_other_rows(folder: Path) -> None:
    """bitsandbytes itself quantizes rows of 96, and computes them wrongly on a CPU."""
    AutoModelForCausalLM.from_pretrained(folder / "narrow", quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4")).save_pretrained(folder / "q")
    try:
        load_causal_lm(folder / "q", torch.float32, "branch")
    except UserError as told:
        assert "down_proj has rows of 96 weights in blocks of 64" in str(told)
    else:
        raise AssertionError("wrong numbers")


def check_bf16(folder: Path) -> None:
    """Adapters have the dtype of the model, as over full weights; their masters are fp32."""
    config = compose([f"model.path={folder / 'wide'}", "model.dtype=bf16", "model.lora.rank=4", "zero=none",
                      "model.quantization=nf4", "cluster.device=cpu", "model.gradient_checkpointing=false"])
    policy = make_policy(config, ModelFolder(folder / "wide"), "branch", World.start(config.cluster))
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.bfloat16}
    weight = policy.model.causal.model.layers[0].self_attn.q_proj.base_layer.weight
    state = weight.quant_state
    stored = [weight, state.absmax, state.state2.absmax]
    assert sum(t.numel() * t.element_size() for t in stored) == FOUR_BITS * 128 * 128, "as plans count"
    policy.backward(-policy.token_logps(BATCH).logps.sum(), is_last=True)
    before = policy.token_logps(BATCH).logps.sum().item()
    assert policy.step(1e-3).item() > 0 and policy.token_logps(BATCH).logps.sum().item() > before


class Products(TorchDispatchMode):
    """Counts products with 4-bit weights."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += operator is torch.ops.bitsandbytes.gemm_4bit.default
        return operator(*args, **(kwargs or {}))


def check_recomputing(folder: Path) -> None:
    """Cheap parts are recomputed without their products; whole layers with them."""
    for how, products in ((0, 14), (1, 14 + 7)):
        lm = add_lora(load_causal_lm(folder / "wide", torch.float32, "branch", quantization="nf4"),
                      LoraConfig(4, None, "all-linear"), 0)
        checkpoint_layers(lm, how)
        with Products() as seen:
            token_logps(ScoredModel(lm, "branch").train(), BATCH).logps.sum().backward()
        assert seen.count == products, (how, seen.count)


def main(folder: str) -> int:
    torch.manual_seed(0)
    check_transposed_layers(Path(folder))
    check_text_and_image(Path(folder))
    check_files_with_other_rows(Path(folder))
    check_bf16(Path(folder))
    check_recomputing(Path(folder))
    print("all models are right")
    return 0


if __name__ == "__main__":
    exit_with(main(*sys.argv[1:]))
