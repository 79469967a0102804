"""Which optimizer updates what, in how many bytes, and what it says where it cannot."""
from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import BITSANDBYTES, write_tiny_llama
from torch import nn

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import OptimConfig
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.policy.optimizers.make import optimizer_module
from dpo_dist.policy.optimizers.muon import MuonAndAdamW, orthogonal
from dpo_dist.policy.optimizers.weights import trained_weights
from dpo_dist.policy.skip import prepare_update
from dpo_dist.sizing.estimate import optimizer_state
from dpo_dist.sizing.shape import read_shape


def optim(*words: str) -> OptimConfig:
    return compose(["model.path=m", *words]).optim


@pytest.fixture(autouse=True)
def with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BITSANDBYTES)


@pytest.fixture
def model(tmp_path: Path) -> ScoredModel:
    """Its matrices are large enough for moments of 8 bits."""
    folder = write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=192)
    return ScoredModel(load_causal_lm(folder, torch.float32, "branch"), "branch")


def stepped(optimizer: torch.optim.Optimizer, lr: float = 1e-2, skip: float = 0.0) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape)
    prepare_update(optimizer, lr, torch.tensor(skip))
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_is_torchs_muon(adjust: str, nesterov: bool):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((48, 32), (32, 48), (64, 64))]
    torchs = [nn.Parameter(p.detach().clone()) for p in ours]
    rest = nn.Parameter(torch.randn(7))
    config = optim("optim=muon", f"optim.adjust_lr_fn={adjust}", f"optim.nesterov={nesterov}", "optim.weight_decay=0.1",
                   "optim.momentum=0.9", "optim.ns_steps=4")
    muon = MuonAndAdamW(ours, [rest], config)
    reference = torch.optim.Muon(torchs, lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=nesterov, ns_steps=4,
                                 adjust_lr_fn=adjust)
    for _ in range(5):
        for one, other in zip(ours, torchs, strict=True):
            one.grad, rest.grad = torch.randn(one.shape), torch.randn(7)
            other.grad = one.grad.clone()
        prepare_update(muon, 1e-2, torch.tensor(0.0))
        muon.step()
        reference.step()
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_an_orthogonal_update_has_singular_values_about_1_and_experts_are_matrices_each():
    torch.manual_seed(0)
    experts = torch.randn(3, 40, 24).bfloat16()
    together = orthogonal(experts, 5)
    singular = torch.linalg.svdvals(together.float())
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert torch.equal(together, torch.stack([orthogonal(one, 5) for one in experts]))


def test_muon_has_the_layers_matrices_and_the_adamw_beside_it_a_rate_of_its_own(model: ScoredModel):
    muon, adamw = optimizer_module(optim("optim=muon")).make_optimizer(
        optim("optim=muon", "optim.adamw_lr_ratio=0.5"), trained_weights(model)).param_groups
    named = {p: name for name, p in model.named_parameters()}
    assert {named[p].rsplit(".", 2)[1] for p in muon["params"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {named[p].rsplit(".", 2)[1] for p in adamw["params"]} == {
        "embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"}
    optimizer = optimizer_module(optim("optim=muon")).make_optimizer(
        optim("optim=muon", "optim.adamw_lr_ratio=0.5"), trained_weights(model))
    prepare_update(optimizer, 0.2, None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_state_takes_the_bytes_that_plan_predicts(name: str, tmp_path: Path, model: ScoredModel):
    config = compose([f"model.path={tmp_path / 'm'}", f"optim={name}"])
    optimizer = stepped(optimizer_module(config.optim).make_optimizer(config.optim, trained_weights(model)))
    held = {t.data_ptr(): t.nbytes for state in optimizer.state.values() for key, t in state.items()
            if isinstance(t, torch.Tensor) and key != "step" and not key.startswith("qmap")}
    predicted = optimizer_state(config, read_shape(tmp_path / "m"))
    assert sum(held.values()) == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_skipped_update_changes_neither_weights_nor_state(name: str, model: ScoredModel):
    config = optim(f"optim={name}", "optim.weight_decay=0.1")
    optimizer = stepped(optimizer_module(config).make_optimizer(config, trained_weights(model)))

    def everything() -> list[torch.Tensor]:
        values = [value for p, state in optimizer.state.items()
                  for value in (p, *(value for key, value in state.items() if not key.startswith("qmap")))]
        return [torch.as_tensor(value).clone() for value in values]

    before = everything()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    prepare_update(optimizer, 1e-2, torch.tensor(1.0))
    optimizer.step()
    assert all(map(torch.equal, before, everything()))
    stepped(optimizer)
    assert not any(map(torch.equal, before, everything()))


def test_a_missing_bitsandbytes_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "dpo_dist.policy.optimizers.adamw_8bit", raising=False)
    with pytest.raises(UserError, match=r"pip install 'dpo-dist\[adamw_8bit\]', or set optim=adamw"):
        optimizer_module(optim("optim=adamw_8bit"))


def test_a_kernel_that_cannot_be_compiled_is_told_and_a_killed_compilers_lock_is_not_waited_for(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if not shutil.which("c++"):
        pytest.skip("no compiler here")
    cpu_adam = importlib.import_module("dpo_dist.policy.optimizers.cpu_adam")
    compiler = tmp_path / "compiler"                     # knows its version and what it is, and compiles nothing
    compiler.write_text('#!/bin/sh\nfor word; do [ "$word" = -c ] && exit 1; done\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_adam, "SECONDS", 120)
    stale = cpu_adam.kernel_folder() / "cpu_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with pytest.raises(UserError, match=r"could not be compiled in .*Error building extension.*set optim=adamw"):
        cpu_adam.load_kernel()
