"""What a model's folder holds is found out before anything is computed: a head of its own or not, all weights."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_text_and_image, write_tiny_llama
from safetensors.torch import load_file, save_file

from dpo_dist.config.errors import UserError
from dpo_dist.models.digest import model_digest
from dpo_dist.models.folder import read_config, tied_embeddings, truthful_json
from dpo_dist.models.load import load_causal_lm
from dpo_dist.sizing.shape import read_shape

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
# heads and embeddings under other names: embed_out and embed_in, lm_head and wte, word_embeddings, decoder.embed_tokens
OTHER_NAMES: dict[str, Any] = {
    "GPTNeoX": transformers.GPTNeoXConfig(**SMALL), "Bloom": transformers.BloomConfig(**SMALL),
    "GPT2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=1),
    "OPT": transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
}


def change(folder: Path, **keys: object) -> Path:
    """The folder, with other keys in config.json (None: without them)."""
    config = {**json.loads((folder / "config.json").read_text()), **keys}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def change_weights(folder: Path, edit: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({name: w.clone() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


def test_files_with_two_matrices_are_two_matrices_whatever_the_flag_says(tmp_path: Path):
    true, false = (write_tiny_llama(tmp_path / name) for name in ("true", "false"))
    change(true, tie_word_embeddings=True)
    assert tied_embeddings(true).flag and not tied_embeddings(true).in_files
    assert read_config(true).tie_word_embeddings is False
    assert truthful_json(true)["tie_word_embeddings"] is False
    assert model_digest(true) == model_digest(false), "the same content has the same key"
    assert read_shape(true).parameters == read_shape(false).parameters
    model = load_causal_lm(true, torch.float32, "branch")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load_causal_lm(false, torch.float32, "branch")))


def test_two_equal_matrices_are_what_the_flag_says(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m")
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    for flag in (True, False):
        change(folder, tie_word_embeddings=flag)
        assert tied_embeddings(folder).in_files is flag
        assert read_config(folder).tie_word_embeddings is flag


def test_a_tied_model_with_one_matrix_stays_tied_under_either_name(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m", tie_word_embeddings=True)
    wanted = logits(load_causal_lm(folder, torch.float32, "branch"))
    assert tied_embeddings(folder).in_files
    change_weights(folder, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))
    assert tied_embeddings(folder).in_files
    assert torch.equal(logits(load_causal_lm(folder, torch.float32, "branch")), wanted)


def test_a_head_that_is_said_to_be_there_and_is_not_is_refused_with_both_remedies(tmp_path: Path):
    folder = change(write_tiny_llama(tmp_path / "m", tie_word_embeddings=True), tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"tie_word_embeddings=false.* hold no output head.*to true in config\.json"):
        tied_embeddings(folder)


def test_a_missing_flag_means_what_the_architecture_means_by_it(tmp_path: Path):
    untied = change(write_tiny_llama(tmp_path / "llama"), tie_word_embeddings=None)
    assert not tied_embeddings(untied).flag and not tied_embeddings(untied).in_files


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_heads_and_embeddings_of_other_names_are_found(name: str, tmp_path: Path):
    config = OTHER_NAMES[name]
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert not tied_embeddings(tmp_path).flag
    change(tmp_path, tie_word_embeddings=True)
    assert tied_embeddings(tmp_path).flag and not tied_embeddings(tmp_path).in_files
    assert torch.equal(logits(load_causal_lm(tmp_path, torch.float32, "padded")), logits(model))


def test_the_flag_of_a_text_part_is_corrected_too(tmp_path: Path):
    write_text_and_image(tmp_path, tied=False)
    before = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, tie_word_embeddings=True, text_config={**before["text_config"], "tie_word_embeddings": True})
    assert not tied_embeddings(tmp_path).in_files
    config = read_config(tmp_path)
    assert (config.tie_word_embeddings, config.text_config.tie_word_embeddings) == (False, False)
    written = truthful_json(tmp_path)
    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (False, False)


def test_missing_weights_are_refused_instead_of_drawn_at_random(tmp_path: Path):
    folder = change_weights(write_tiny_llama(tmp_path), lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lack 1 weights of a LlamaForCausalLM.*layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(folder, torch.float32, "branch")


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused_by_name(tmp_path: Path):
    folder = change(write_tiny_llama(tmp_path), vocab_size=70)
    with pytest.raises(UserError, match=r"a vocabulary of 70, but .*embed_tokens\.weight .* has 64 rows"):
        read_config(folder)


def test_other_sizes_than_config_json_says_are_refused(tmp_path: Path):
    folder = change(write_tiny_llama(tmp_path), intermediate_size=40)
    with pytest.raises(UserError, match=r"hold other sizes than its config\.json says"):
        load_causal_lm(folder, torch.float32, "branch")


def test_a_file_that_the_index_names_and_that_is_not_there_is_refused_by_name(tmp_path: Path):
    folder = write_tiny_llama(tmp_path)
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    gone = sorted(folder.glob("model-00002-*"))[0]
    gone.unlink()
    with pytest.raises(UserError, match=rf"lacks {gone.name} \(1 of "):
        read_config(folder)


def test_code_in_a_models_folder_is_never_run(tmp_path: Path):
    folder = change(write_tiny_llama(tmp_path), model_type="ours", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise AssertionError('run')")
    with pytest.raises(UserError, match=r"code of its own \(auto_map\).* no model_type=ours"):
        read_config(folder)


@pytest.mark.parametrize(("config", "why"), [
    (transformers.T5Config(), r"is an encoder-decoder \(t5\)"),
    (transformers.ViTConfig(), "describes a vit, which transformers has no causal language model for")])
def test_what_is_no_causal_language_model_is_refused_by_its_kind(config: Any, why: str, tmp_path: Path):
    config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=why):
        read_config(tmp_path)
