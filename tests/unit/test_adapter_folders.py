"""An adapter's folder: its base is found, its content has a digest, its tokenizer comes first, its size is planned for.
What cannot be computed is refused before anything is loaded."""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import write_text_and_image, write_tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.config.adapter import names_adapter
from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import LoraConfig
from dpo_dist.models.digest import folder_digest, model_digest
from dpo_dist.models.load import load_causal_lm
from dpo_dist.models.lora import REFERENCE, add_adapter, add_lora
from dpo_dist.models.resolve import resolve
from dpo_dist.models.tokenizer import tokenizer_folder
from dpo_dist.run.model_card import base_of
from dpo_dist.sizing.report import sizing_lines
from dpo_dist.sizing.shape import read_shape

COMMIT = "0123456789" * 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    torch.manual_seed(0)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"],
                                        task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **keys: object) -> Path:
    """The adapter, with other keys in adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return folder


def rewrite(folder: Path, edit: Any) -> Path:
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def found(adapter: Path) -> Path:
    return resolve(str(adapter), "model.path", offline=True).base


def test_the_base_is_found_from_the_working_folder_and_from_the_adapters(
        base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert found(adapter) == base
    assert found(change(adapter, base_model_name_or_path="../base")).samefile(base)
    monkeypatch.chdir(tmp_path)
    assert found(change(adapter, base_model_name_or_path="base")).samefile(base)


def test_adapters_and_bases_of_the_hub_are_looked_up_and_exported_with_their_revision(
        base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    change(adapter, base_model_name_or_path="a/model", revision="v2")
    for name, folder in (("model", base), ("adapter", adapter)):
        cached = tmp_path / "hub" / f"models--a--{name}"
        shutil.copytree(folder, cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "v2").write_text(COMMIT)
    assert names_adapter("a/adapter@v2") and not names_adapter("a/adapter") and not names_adapter("a/model@v2")
    config = compose(["model.path=a/adapter@v2", "reference=adapter_off", "export.what=adapter"])
    policy = resolve(config.model.path, "model.path", offline=True)
    assert policy.base.samefile(tmp_path / "hub" / "models--a--model" / "snapshots" / COMMIT)
    assert base_of(policy, config) == ("a/model", "v2")
    fresh = compose(["model.path=a/model@v2", "model.lora.rank=4"])
    assert base_of(resolve(fresh.model.path, "model.path", offline=True), fresh) == ("a/model", "v2")
    with pytest.raises(UserError, match=r"adapter for 'a/model'.* neither a folder nor .* run\.offline=false"):
        found(change(adapter, revision="v3"))


def test_the_digest_covers_base_tensors_and_what_scales_them_and_nothing_else(base: Path, adapter: Path,
                                                                              tmp_path: Path):
    def digest() -> str:
        return folder_digest(resolve(str(adapter), "model.path", offline=True))

    def now() -> Iterator[str]:
        change(adapter, lora_dropout=0.4, target_modules=".*q_proj", peft_version="0.1", inference_mode=False)
        yield digest()
        change(adapter, lora_alpha=3)
        yield digest()
        change(adapter, use_rslora=True)
        yield digest()
        rewrite(adapter, lambda w: next(iter(w.values())).add_(1))
        yield digest()
        write_tiny_llama(base, seed=1)
        yield digest()

    first, (same, *others) = digest(), now()
    assert first == same != model_digest(base) and len({first, *others}) == 5


def test_the_adapters_own_tokenizer_comes_before_its_bases(base: Path, adapter: Path):
    (base / "tokenizer_config.json").write_text("{}")
    assert tokenizer_folder(str(adapter), "model.path", offline=True) == base
    assert resolve(str(adapter), "model.path", offline=True).tokenizer == base
    (adapter / "tokenizer.json").write_text("{}")
    assert tokenizer_folder(str(adapter), "model.path", offline=True) == adapter
    assert resolve(str(adapter), "model.path", offline=True).tokenizer == adapter


def test_plans_know_an_adapters_size_and_that_its_base_is_frozen(base: Path, adapter: Path):
    tensors = load_file(adapter / "adapter_model.safetensors").values()
    shape = read_shape(base, resolve(str(adapter), "model.path", offline=True).adapter)
    lora = compose([f"model.path={adapter}"]).model.lora
    assert shape.trained_parameters(lora) == sum(t.numel() for t in tensors)
    assert shape.freezes_base(lora) and shape.trains_head(lora) and shape.parameters == read_shape(base).parameters
    said = "\n".join(sizing_lines(compose([f"model.path={adapter}", "cluster.device=cpu", "zero=none"]), 1))
    assert "parameters (llama)" in said and "not predicted" not in said
    shutil.rmtree(base)
    assert "is no folder here" in sizing_lines(compose([f"model.path={adapter}"]), 1)[0]


def test_a_fresh_adapters_size_counts_magnitudes_and_what_is_trained_whole(base: Path):
    lora = LoraConfig(3, None, "all-linear", ("embed_tokens", "lm_head"), dora=True)
    model = add_lora(load_causal_lm(base, torch.float32, "branch"), lora, 0)
    assert read_shape(base).trained_parameters(lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


REFUSED: dict[str, dict[str, object]] = {
    "is an adapter of type IA3; only LoRA adapters": {"peft_type": "IA3"},
    "is an adapter for task_type=SEQ_CLS": {"task_type": "SEQ_CLS"},
    "names no base; set base_model_name_or_path": {"base_model_name_or_path": None},
    "says bias=all, which is not computed here; merge it": {"bias": "all"},
    "says init_lora_weights=pissa_niter_4, which is not computed here": {"init_lora_weights": "pissa_niter_4"},
    "says trainable_token_indices=[1], which is not computed here": {"trainable_token_indices": [1]},
    "holds weights of the base itself (base_model.model.lm_head.weight; 1 in all)": {"modules_to_save": None},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_computed_is_refused_before_anything_is_loaded(message: str, adapter: Path):
    change(adapter, **REFUSED[message])
    with pytest.raises(UserError, match=re.escape(message)):
        compose([f"model.path={adapter}"])


def test_weights_that_are_missing_or_a_pickle_are_refused_with_the_remedy(base: Path, adapter: Path):
    (adapter / "adapter_model.safetensors").unlink()
    for file, remedy in ((None, "copy the adapter again"), ("config.json", "take adapter_config.json out of"),
                         ("adapter_model.bin", "save it again")):
        if file:
            (adapter / file).touch()
        with pytest.raises(UserError, match=re.escape(remedy)):
            resolve(str(adapter), "reference.path", offline=True)


def test_an_adapter_on_an_adapter_is_refused(adapter: Path, tmp_path: Path):
    shutil.copytree(adapter, tmp_path / "second")
    with pytest.raises(UserError, match="is an adapter on another adapter"):
        found(change(tmp_path / "second", base_model_name_or_path=str(adapter)))


BESIDE: dict[str, list[str]] = {
    "model.lora.rank=8 would do nothing: model.path=": ["model.lora.rank=8"],
    "model.lora.alpha=8.0 would do nothing": ["model.lora.alpha=8"],
    "is an adapter, which reference.engine=tensor_parallel cannot compute; set reference=adapter": [
        "reference=tensor_parallel"],
    "which reference.engine=vllm cannot compute": ["reference=vllm"],
    "which reference.engine=hf with reference.offload=disk cannot compute": ["reference.offload=disk"],
    "needs a policy that trains whole weights": ["reference.mode=live", "reference.sync={mode: hard, every_steps: 2}"],
}


@pytest.mark.parametrize("message", BESIDE)
def test_keys_that_do_not_go_with_an_adapter_are_refused_by_name(message: str, adapter: Path):
    with pytest.raises(UserError, match=re.escape(message)):
        compose([f"model.path={adapter}", *BESIDE[message]])


def test_a_model_is_no_reference_adapter(base: Path):
    with pytest.raises(UserError, match=r"is no adapter, which reference\.engine=adapter needs"):
        compose([f"model.path={base}", "model.lora.rank=2", "reference=adapter", f"reference.path={base}"])


def test_an_adapter_of_another_model_is_refused_by_the_tensor_that_does_not_fit(adapter: Path, tmp_path: Path):
    other = write_tiny_llama(tmp_path / "other", hidden_size=64)
    with pytest.raises(UserError, match=r"does not fit .*size mismatch"):
        add_adapter(load_causal_lm(other, torch.float32, "branch"), resolve(str(adapter), "k", True).adapter)
    rewrite(adapter, lambda w: w.pop(min(name for name in w if "lora_A" in name)))
    with pytest.raises(UserError, match=r"it lacks .*lora_A"):
        add_adapter(load_causal_lm(found(adapter), torch.float32, "branch"), resolve(str(adapter), "k", True).adapter)


def test_an_adapter_arrives_whole_and_one_beside_it_stays_frozen(base: Path, adapter: Path):
    rewrite(adapter, lambda w: [t.normal_() for t in w.values()])
    described = resolve(str(adapter), "k", True).adapter
    fresh = add_lora(load_causal_lm(base, torch.float32, "branch"), LoraConfig(2, None, ("v_proj",)), 0)
    model = add_adapter(fresh, described, REFERENCE)
    assert all("default" in name for name, p in model.named_parameters() if p.requires_grad)
    written = load_file(adapter / "adapter_model.safetensors")
    beside = {name.replace(".reference", "").replace(".modules_to_save", ""): p for name, p in model.named_parameters()
              if ".reference." in name}
    assert beside.keys() == written.keys() and all(torch.equal(beside[name], written[name]) for name in written)


@pytest.mark.parametrize(("names", "message"), [
    (("mlp",), "names 'model.layers.0.mlp', a LlamaMLP; name single modules"),
    (("act_fn",), "name single modules with weights"),
    (("nope",), "the model has no module 'nope'")])
def test_modules_that_cannot_be_trained_whole_are_refused_by_name(names: tuple[str, ...], message: str, base: Path):
    with pytest.raises(UserError, match=re.escape(message)):
        add_lora(load_causal_lm(base, torch.float32, "branch"), LoraConfig(2, None, "all-linear", names), 0)


def test_an_embedding_that_is_the_head_and_modules_that_see_images_are_not_trained_whole(tmp_path: Path):
    tied = write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(UserError, match="the embedding and the output head at once"):
            add_lora(load_causal_lm(tied, torch.float32, "branch"), LoraConfig(2, None, "all-linear", (name,)), 0)
    sees = write_text_and_image(tmp_path / "sees")
    with pytest.raises(UserError, match="which text does not train; name more of it"):
        add_lora(load_causal_lm(sees, torch.float32, "branch"), LoraConfig(2, None, "all-linear", ("q_proj",)), 0)
