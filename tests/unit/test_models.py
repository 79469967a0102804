"""Packed equals plain, for every architecture that branch attention accepts; digests see content and nothing else."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_tiny_llama

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig, ModelConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.logps import plain_token_logps
from dpo_dist.models.attention import Forest, branch_attention, packed_attention
from dpo_dist.models.digest import model_digest
from dpo_dist.models.fit import branch_misfit, choose_attention
from dpo_dist.models.folder import stored_dtype
from dpo_dist.models.load import ScoredModel, load_causal_lm, token_logps
from dpo_dist.models.lora import add_lora
from dpo_dist.models.weights import merged_weights, write_shards
from dpo_dist.types import PackedBatch, TokenizedPair

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2,
         "eos_token_id": 1, "initializer_range": 0.2}
ARCHITECTURES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": 6}, "Phi3": {},
    "Granite": {"logits_scaling": 4.0}, "Olmo2": {},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0,
               "attn_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, "GPTNeoX": {},
}
PAIRS = [TokenizedPair((5, 6, 7, 8, 9, 10, 11, 12), (20, 21, 22, 23, 24, 25, 1), (30, 31, 1), "a"),
         TokenizedPair((40,), (41, 42, 1), (1,), "b"),
         TokenizedPair((5, 6, 7, 8, 9, 10, 11, 12), (30, 31, 1), (50, 51, 52, 1), "c")]


def small_model(name: str, attention: str) -> ScoredModel:
    shape = {**SMALL, **ARCHITECTURES[name]} if name != "GPT2" else {"vocab_size": 64, **ARCHITECTURES[name]}
    config = getattr(transformers, f"{name}Config")(**shape, tie_word_embeddings=name in ("GPT2", "Gemma2"))
    config._attn_implementation = attention if attention != "padded" else "eager"
    torch.manual_seed(0)
    is_gpt2 = name == "GPT2"
    model = getattr(transformers, "GPT2LMHeadModel" if is_gpt2 else f"{name}ForCausalLM")(config)
    return ScoredModel(model.double().eval(), attention)


def plain(model: ScoredModel, batch: PackedBatch) -> torch.Tensor:
    rows = [(tree.prompt, branch) for tree in batch.trees for branch in tree.branches]
    ids = batch.input_ids[0]
    return torch.cat([plain_token_logps(model.causal, ids[slice(*p)], ids[slice(*b)]) for p, b in rows])


@pytest.fixture
def softmax_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models' eager attention narrows its softmax to fp32. There a padded row's sum rounds otherwise than a shorter
    row's, on some CPUs."""
    wide = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None, **_: wide(scores, dim))


@pytest.mark.usefixtures("softmax_in_fp64")
@pytest.mark.parametrize("attention", ["branch", "padded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_log_probs_and_gradients_equal_the_models_own_forward(name: str, attention: str):
    model, batch = small_model(name, attention), pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    packed = token_logps(model, batch).logps
    packed.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    wanted = plain(model, batch)
    wanted.sum().backward()
    assert (packed - wanted).abs().max() < 1e-10
    bound = 1e-10 if name.startswith("GPT") else 2e-6          # RMS norms compute in fp32 even in an fp64 model
    for n, p in model.named_parameters():
        assert (p.grad - gradients[n]).abs().max() < bound * max(1.0, p.grad.abs().max().item()), n


@pytest.mark.parametrize("load", [stored_dtype, lambda folder: load_causal_lm(folder, torch.float32, "branch")])
def test_a_folder_without_safetensors_is_refused_by_name(load, tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"m holds no \*.safetensors.*; convert the weights"):
        load(folder)


def by_the_book(q, k, v, starts_q, starts_k, max_q, max_k, scale, window):
    """What a variable-length kernel owes, in plain torch: each sequence by itself, causal, aligned at the lower
    right."""
    out = []
    for i in range(len(starts_q) - 1):
        seen = slice(starts_k[i], starts_k[i + 1])
        queries, keys, values = q[starts_q[i]:starts_q[i + 1]], k[seen], v[seen]
        assert len(queries) <= max_q and len(keys) <= max_k
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (keys, values))
        back = torch.arange(len(queries))[:, None] + keys.shape[1] - len(queries) - torch.arange(keys.shape[1])[None]
        visible = (back >= 0) & ((window is None) | (back < (window or 0)))
        scores = (queries.transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(~visible, -torch.inf)
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 4])
def test_one_variable_length_call_is_branch_attention_with_its_gradients(window: int | None):
    """The kernel itself needs a GPU (tests/gpu); what it is asked for does not."""
    torch.manual_seed(0)
    trees = pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3).trees
    tokens = trees[-1].branches[-1].end
    q, k, v = (torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    upstream = torch.randn(1, tokens, 4, 8, dtype=torch.float64)
    wanted, _ = branch_attention(None, q, k, v, None, scaling=0.3, forest=Forest(trees), sliding_window=window)
    found = packed_attention(q, k, v, Forest(trees), 0.3, window, by_the_book)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((found * upstream).sum(), (q, k, v)),
                               torch.autograd.grad((wanted * upstream).sum(), (q, k, v)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "GPT2"])
def test_branch_attention_is_found_to_fit(name: str):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "hidden_size": 64, "num_hidden_layers": 4,
                                                       **ARCHITECTURES[name]})
    assert branch_misfit(config) is None


@pytest.mark.parametrize("name", ["OPT", "Starcoder2", "Falcon", "GPT2"])
def test_a_model_in_training_has_no_dropout_whatever_its_config_says(name: str, tmp_path: Path):
    rates = {"OPT": {"dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32},
             "Starcoder2": {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5},
             "Falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
             "GPT2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{key: value for key, value in SMALL.items() if key != "head_dim"},
                                                    **rates[name])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = ScoredModel(load_causal_lm(tmp_path, torch.float32, "padded"), "padded")
    batch = pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    assert torch.equal(token_logps(model.train(), batch).logps, token_logps(model.eval(), batch).logps)


def test_an_architecture_that_branch_attention_would_get_wrong_is_found_out_and_padded(tmp_path: Path):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    model = ModelConfig(str(tmp_path), "fp32", "auto", False, False, LoraConfig(0, None, "all-linear"))
    attention, why = choose_attention(model, tmp_path)
    assert attention == "padded" and "differ" in why
    with pytest.raises(UserError, match=r"model\.attention=branch does not fit .* set model\.attention=auto"):
        choose_attention(ModelConfig(str(tmp_path), "fp32", "branch", False, False, LoraConfig(0, None, "all-linear")),
                         tmp_path)


def test_attention_sinks_which_branch_attention_does_not_know_are_found_out():
    assert "differ" in str(branch_misfit(transformers.GptOssConfig()))


def test_adapters_on_the_output_head_are_refused_instead_of_lost(tmp_path: Path):
    folder = write_tiny_llama(tmp_path)
    with pytest.raises(UserError, match=r"model\.lora\.target_modules=.* names the output head 'lm_head'"):
        ScoredModel(add_lora(load_causal_lm(folder, torch.float32, "branch"),
                             LoraConfig(4, None, ("lm_head", "q_proj")), 0), "branch")


def test_merged_lora_weights_equal_the_adapted_model_for_transposed_layers_too(tmp_path: Path):
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2,
                                                         n_head=4)).save_pretrained(tmp_path / "m")
    model = ScoredModel(add_lora(load_causal_lm(tmp_path / "m", torch.float32, "branch"),
                                 LoraConfig(4, None, "all-linear"), 0), "branch")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    write_shards(tmp_path / "m", merged_weights(model), write=True)
    batch = pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    exported = ScoredModel(load_causal_lm(tmp_path / "m", torch.float32, "branch"), "branch")
    assert (token_logps(exported, batch).logps - token_logps(model.eval(), batch).logps).abs().max() < 1e-4


def test_fresh_lora_adapters_change_nothing_and_trained_ones_do(tmp_path: Path):
    folder, batch = write_tiny_llama(tmp_path), pack_pairs(PAIRS, [0, 1, 2], [1.0] * 3)
    base = token_logps(ScoredModel(load_causal_lm(folder, torch.float32, "branch"), "branch"), batch).logps
    model = ScoredModel(add_lora(load_causal_lm(folder, torch.float32, "branch"), LoraConfig(4, None, "all-linear"), 0),
                        "branch")
    assert torch.equal(token_logps(model, batch).logps, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    assert not torch.allclose(token_logps(model, batch).logps, base)
    with model.lm.disable_adapter():
        assert torch.equal(token_logps(model, batch).logps, base)


def test_a_digest_sees_one_changed_weight_and_not_the_files_names_or_sharding(tmp_path: Path):
    one, other, split = (write_tiny_llama(tmp_path / n) for n in ("one", "other", "split"))
    assert model_digest(one) == model_digest(other)
    model = transformers.LlamaForCausalLM.from_pretrained(split)
    (split / "model.safetensors").unlink()
    model.save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    assert model_digest(split) == model_digest(one)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-4
    model.save_pretrained(other)
    assert model_digest(other) != model_digest(one)


def test_a_digest_sees_a_change_of_the_configs_numbers(tmp_path: Path):
    folder = write_tiny_llama(tmp_path)
    before = model_digest(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "use_cache": False}))
    assert model_digest(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_digest(folder) != before
