"""What an exported model lacks of the one that it came from is told."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_tiny_llama
from safetensors.torch import load_file, save_file

from dpo_dist.export import not_exported


def rewrite(folder: Path, **more: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_that_transformers_does_not_load_are_named(tmp_path: Path, tied: bool):
    source, model = (write_tiny_llama(tmp_path / name, tie_word_embeddings=tied) for name in ("m", "exported"))
    assert not_exported(source, model) == []
    rewrite(source, **{"model.layers.2.eh_proj.weight": torch.ones(4, 8), "model.layers.2.norm.weight": torch.ones(8)})
    assert not_exported(source, model) == ["model.layers.2.eh_proj.weight", "model.layers.2.norm.weight"]


def test_a_second_copy_of_tied_embeddings_is_not_missed(tmp_path: Path):
    source, model = (write_tiny_llama(tmp_path / name, tie_word_embeddings=True) for name in ("m", "exported"))
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(source, **{"lm_head.weight": embedding.clone()})
    assert not_exported(source, model) == []


def test_the_same_tensors_under_other_names_are_not_missed(tmp_path: Path):
    source, model = (write_tiny_llama(tmp_path / name) for name in ("m", "exported"))
    weights = {f"language_model.{name}": tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert not_exported(source, model) == []
