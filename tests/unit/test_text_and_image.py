"""A checkpoint that also sees images: text rows train its language model, and what sees images stays as it is."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_text_and_image

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.logps import plain_token_logps
from dpo_dist.models.checkpointing import decoder_layers
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.fit import branch_misfit
from dpo_dist.models.folder import read_config
from dpo_dist.models.load import ScoredModel, load_causal_lm, token_logps
from dpo_dist.models.lora import add_lora
from dpo_dist.models.text import backbone, layer_stack
from dpo_dist.models.weights import merged_weights, write_shards
from dpo_dist.sizing.shape import read_shape
from dpo_dist.types import TokenizedPair

BATCH = pack_pairs([TokenizedPair(tuple(range(5, 17)), (20, 21, 22, 23, 24, 1), (30, 31, 1), "a"),
                    TokenizedPair((40, 41), (41, 42, 1), (1,), "b")], [0, 1], [1.0] * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_text_and_image(tmp_path / "m")


def sees_images(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name


def test_packed_log_probs_are_those_of_the_whole_models_own_forward(folder: Path):
    assert branch_misfit(read_config(folder)) is None
    model = ScoredModel(load_causal_lm(folder, torch.float64, "branch"), "branch").eval()
    assert type(model.causal) is transformers.Gemma3ForConditionalGeneration
    ids = BATCH.input_ids[0]
    wanted = torch.cat([plain_token_logps(model.causal, ids[slice(*tree.prompt)], ids[slice(*branch)])
                        for tree in BATCH.trees for branch in tree.branches])
    assert (token_logps(model, BATCH).logps - wanted).abs().max() < 1e-6
    assert model.causal.config.vision_config._attn_implementation != "branch", "images keep their own attention"


def test_text_trains_the_language_model_alone(folder: Path):
    model = ScoredModel(load_causal_lm(folder, torch.float32, "branch"), "branch").train()
    token_logps(model, BATCH).logps.sum().backward()
    for name, parameter in model.causal.named_parameters():
        assert parameter.requires_grad is not sees_images(name), name
        assert (parameter.grad is not None) is not sees_images(name), name


def test_adapters_go_to_the_language_model_alone(folder: Path):
    for targets in ("all-linear", ("q_proj", "v_proj")):          # both towers have layers of these names
        model = add_lora(load_causal_lm(folder, torch.float32, "branch"), LoraConfig(2, None, targets), 0)
        adapters = [name for name, p in model.named_parameters() if p.requires_grad]
        assert adapters and not any(sees_images(name) for name in adapters)


def test_layers_and_sizes_are_the_language_models(folder: Path):
    model = load_causal_lm(folder, torch.float32, "branch")
    assert len(layer_stack(model)) == len(decoder_layers(model)) == 2, "not the three that see images"
    flops, text = forward_flops(read_config(folder)), forward_flops(read_config(folder).text_config)
    assert (flops.per_token, flops.per_completion_token) == (text.per_token, text.per_completion_token)
    shape = read_shape(folder)
    assert shape.parameters == sum(p.numel() for p in backbone(model).parameters())
    assert shape.frozen == sum(p.numel() for n, p in model.named_parameters() if sees_images(n))


def test_what_is_exported_is_whole_and_what_saw_images_is_bit_identical(folder: Path, tmp_path: Path):
    model = ScoredModel(load_causal_lm(folder, torch.float32, "branch"), "branch")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_shards(out, merged_weights(model), write=True)
    before, after = (transformers.AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (folder, out))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) is sees_images(name), name


def test_a_config_that_names_few_sizes_is_not_sized(folder: Path):
    """As the first Gemma 3 checkpoints: the text part leaves out what its class has by default."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not say num_attention_heads"):
        read_shape(folder)
