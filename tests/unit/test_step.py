"""A step's gradient is that of all its pairs at once, each weighing what it should: in plain torch, one process."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_rows, write_tiny_llama

from dpo_dist.config.compose import compose
from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.reference.hf import HfReference
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.world import World
from dpo_dist.sizing.flops import Flops
from dpo_dist.step import step_batches, train_step

FLOPS = Flops(1e5, 1e4, ((1e3, None),))
WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def gradient(tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """gradient(rows, loss, tokens_per_microbatch) → {parameter: gradient of one step over these rows}."""
    policy_folder, reference_folder = write_tiny_llama(tmp_path / "p", seed=0), write_tiny_llama(tmp_path / "r", seed=1)
    reference = HfReference(ModelFolder(reference_folder), torch.float32, "branch", WORLD.device)

    def pairs_of(rows: list[dict[str, object]]) -> PairStore:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = compose([f"model.path={policy_folder}", f"data.train=[{{path: {path}, format: token_ids}}]",
                          f"data.cache_dir={tmp_path / 'tokens'}"])
        return prepare(config.data, None, None)[0]

    def run(rows: list[dict[str, object]], loss: LossConfig,
            tokens_per_microbatch: int = 10_000) -> dict[str, torch.Tensor]:
        pairs, loss = pairs_of(rows), resolve_loss(loss)
        optim = compose([f"model.path={policy_folder}"]).optim
        policy = SinglePolicy(ScoredModel(load_causal_lm(policy_folder, torch.float32, "branch"), "branch"), optim,
                              WORLD.device)
        step = step_batches(pairs, np.arange(len(pairs)), loss, WORLD, tokens_per_microbatch, FLOPS)
        train_step(policy, reference if loss.needs_reference else None, step, loss, MetricSums(loss, WORLD.device),
                   WORLD, Clock(WORLD))
        return {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}

    return run


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


@pytest.mark.parametrize("loss", [LossConfig("sigmoid", beta=0.5), LossConfig("sft"), LossConfig("simpo"),
                                  LossConfig("ipo", ld_alpha=0.5), LossConfig("sigmoid", wpo=True),
                                  LossConfig("mixture", terms={"sigmoid": 1.0, "sft": 0.3})], ids=str)
def test_the_gradient_does_not_depend_on_the_packs(gradient: Callable[..., dict[str, torch.Tensor]], tmp_path: Path,
                                                   loss: LossConfig):
    rows = write_rows(tmp_path / "x", 9)
    # shared prompts and completions
    rows += [{**rows[0], "chosen_ids": rows[0]["rejected_ids"], "rejected_ids": [9, 9, 1]}, rows[1]]
    assert close(gradient(rows, loss), gradient(rows, loss, tokens_per_microbatch=80))


def test_the_budget_bounds_and_counts_what_a_padded_model_computes(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m")
    r = np.random.default_rng(0)
    rows = [{part: r.integers(3, 64, n).tolist() for part, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"),
                                                                    lengths, strict=True)}
            for lengths in [(100, 50, 50), *29 * [(2, 6, 6)]]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose([f"model.path={folder}", f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, format: token_ids}}]",
                      f"data.cache_dir={tmp_path / 'tokens'}"])
    pairs, loss = prepare(config.data, None, None)[0], resolve_loss(LossConfig("sigmoid"))
    model = ScoredModel(load_causal_lm(folder, torch.float32, "padded"), "padded")
    computed: list[int] = []
    model.causal.base_model.register_forward_pre_hook(lambda *given: computed.append(given[-1]["input_ids"].numel()),
                                                      with_kwargs=True)
    step = step_batches(pairs, np.arange(30), loss, WORLD, 400, replace(FLOPS, padded=True))
    for batch in step.batches:
        model(batch)
    assert max(computed) <= 400 and sum(computed) == step.work.tokens


def test_a_row_of_weight_two_counts_as_much_as_the_row_twice(gradient: Callable[..., dict[str, torch.Tensor]],
                                                             tmp_path: Path):
    rows = write_rows(tmp_path / "x", 4)
    for loss in (LossConfig("sigmoid"), LossConfig("sft")):
        assert close(gradient([{**rows[0], "weight": 2.0}, *rows[1:]], loss), gradient([rows[0], *rows], loss))
        assert not close(gradient(rows, loss), gradient([rows[0], *rows], loss))
