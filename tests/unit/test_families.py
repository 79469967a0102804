"""Families of models: a sample of benchmarks/families.py, and what its committed result says."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPO
from safetensors.torch import load_file

from dpo_dist.models.final_logits import final_logits
from dpo_dist.models.fit import branch_misfit, padded_misfit
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.models.tiny import shrink, tiny_backbone
from dpo_dist.models.weights import merged_weights, write_shards

sys.path.insert(0, str(REPO / "benchmarks"))
import families

SAMPLE = {
    "mixtral": "packed", "qwen3_moe": "packed", "gemma3": "packed", "qwen2_5_vl": "packed",  # experts, windows, images
    "gpt_oss": "padded", "qwen3_next": "padded", "jamba": "padded", "llama4_text": "padded",  # sinks, states, chunks
    "bert": "refused", "t5": "refused",
}


@pytest.mark.parametrize(("family", "outcome"), SAMPLE.items())
def test_a_family_is_packed_or_padded_with_its_own_log_probs_or_refused(family: str, outcome: str, tmp_path: Path):
    found = families.outcome(family, tmp_path)
    assert found["outcome"] == outcome, found


def test_no_family_came_out_wrong():
    results = json.loads(families.RESULT.read_text())
    assert set(results["families"]) == set(families.FAMILIES) or results["transformers"] != transformers.__version__
    assert results["counted"]["wrong"] == 0
    assert results["counted"]["packed"] + results["counted"]["padded"] > 150


@pytest.mark.parametrize("family", ["mixtral", "gemma3", "gpt_neox", "qwen3_next"])
def test_weights_are_exported_under_the_names_and_in_the_pieces_of_the_files_they_came_from(family: str,
                                                                                           tmp_path: Path):
    """transformers stacks experts and renames towers; other programs read the published names."""
    families.save_tiny(families.published(family), tmp_path)
    model = ScoredModel(load_causal_lm(tmp_path, torch.float32, "padded"), "padded")
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "out", merged_weights(model), write=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_that_are_special_late_are_in_the_tiny_model():
    """DeepSeek V3's experts begin at its fourth layer, and Jamba's attention at its fifth."""
    deepseek = tiny_backbone(transformers.DeepseekV3Config(), "eager")
    assert len(deepseek.layers) == 4 and hasattr(deepseek.layers[3].mlp, "experts")
    jamba = tiny_backbone(transformers.JambaConfig(), "eager")
    assert {type(layer).__name__ for layer in jamba.layers} == {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"}
    assert len(tiny_backbone(transformers.LlamaConfig(num_hidden_layers=80), "eager").layers) == 2


def test_an_architecture_in_which_tokens_are_not_felt_proves_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo_dist.models.tiny.shake", lambda p: p.zero_() if p.ndim > 1 and len(p) not in (64, 1024)
                        else p.normal_())                # embeddings alone: 64 tokens, 1024 positions
    assert "does not feel other tokens" in str(branch_misfit(transformers.GPT2Config()))


def test_rows_in_which_later_tokens_are_seen_are_found_out():
    assert "not causal" in str(padded_misfit(transformers.BertConfig()))
    assert padded_misfit(transformers.BertConfig(is_decoder=True)) is None
    assert padded_misfit(transformers.MambaConfig()) is None


def test_thresholds_of_length_are_small_enough_to_show():
    """What looks only so far, or picks so many, must do it within the tiny rows."""
    small = shrink(transformers.Llama4TextConfig())
    assert small.attention_chunk_size == 6
    assert shrink(transformers.MistralConfig(sliding_window=4096)).sliding_window == 6


@pytest.mark.parametrize(("config", "wanted"), [
    (transformers.LlamaConfig(), (1.0, None)), (transformers.CohereConfig(logit_scale=0.25), (0.25, None)),
    (transformers.GraniteConfig(logits_scaling=4.0), (0.25, None)),
    (transformers.Gemma2Config(final_logit_softcapping=5.0), (1.0, 5.0)),
    (transformers.RecurrentGemmaConfig(logits_soft_cap=7.0), (1.0, 7.0))], ids=lambda v: getattr(v, "model_type", ""))
def test_what_is_done_to_final_logits_is_measured(config, wanted):
    assert final_logits(config) == pytest.approx(wanted)


def test_a_name_that_means_another_thing_elsewhere_does_not_mislead():
    """HyperCLOVA X multiplies by what Granite calls the same and divides by."""
    hyperclovax = pytest.importorskip("transformers.models.hyperclovax").HyperCLOVAXConfig(logits_scaling=4.0)
    assert final_logits(hyperclovax)[0] == pytest.approx(4.0)


def test_weights_between_the_layers_and_the_head_are_refused(tmp_path: Path):
    found = families.outcome("modernbert-decoder", tmp_path)
    assert found["outcome"] == "refused" and "lm_head.dense.weight" in found["why"]


def test_tiny_models_draw_nothing_from_the_runs_generator():
    before = torch.get_rng_state()
    tiny_backbone(transformers.LlamaConfig(), "branch")
    assert torch.equal(torch.get_rng_state(), before)
