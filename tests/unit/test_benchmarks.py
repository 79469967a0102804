"""What the benchmarks compare with computes the same thing."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, train_on, write_rows, write_tiny_llama

from dpo_dist.compose import compose
from dpo_dist.data.store import prepare
from dpo_dist.metrics import MetricSums
from dpo_dist.models.attention import Forest
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.load import ScoredModel, load_causal_lm, read_config
from dpo_dist.perf import Clock
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.preference import Span, Tree
from dpo_dist.reference.hf import HfReference
from dpo_dist.step import step_batches, train_step
from dpo_dist.world import World

sys.path.append(str(REPO / "benchmarks"))

from gpu_attention import CANDIDATES
from naive_dpo import naive_gradients


def test_the_naive_step_of_the_gpu_benchmark_has_the_loss_and_gradients_of_ours(tmp_path: Path, base: list[str]):
    write_rows(tmp_path / "rows.jsonl", 6)
    policy_folder, reference_folder = write_tiny_llama(tmp_path / "policy"), write_tiny_llama(tmp_path / "reference_model", seed=1)
    config = compose([*base, f"model.path={policy_folder}", train_on(tmp_path / "rows.jsonl"), "loss.beta=0.2"])
    world, pairs = World(rank=0, size=1, local_rank=0, device=torch.device("cpu")), prepare(config.data, None, None)[0]

    ours = SinglePolicy(ScoredModel(load_causal_lm(policy_folder, torch.float32, "branch"), "branch"), config.optim, world.device)
    reference = HfReference(reference_folder, torch.float32, "branch", world.device)
    flops = forward_flops(read_config(policy_folder)).training(frozen_base=False)
    batches = step_batches(pairs, np.arange(6), config.loss, world, 1000, flops)
    loss = train_step(ours, reference, batches, config.loss, MetricSums(config.loss, world.device), world, Clock(world)).item()

    naive = load_causal_lm(policy_folder, torch.float32, "padded")
    theirs = naive_gradients(naive, load_causal_lm(reference_folder, torch.float32, "padded"), [pairs[i] for i in range(6)], 2, 0.2,
                             world.device)
    assert theirs == pytest.approx(loss, abs=1e-5)
    for (name, a), b in zip(naive.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_the_attentions_that_the_gpu_benchmark_compares_see_the_same_keys(name: str, kv_heads: int):
    torch.manual_seed(0)
    forest = Forest((Tree(Span(0, 10), (Span(10, 17), Span(17, 22))), Tree(Span(22, 29), (Span(29, 45),))))
    q, k, v = (torch.randn(1, heads, 45, 16) for heads in (4, kv_heads, kv_heads))
    wanted = CANDIDATES["branch"](None, q, k, v, None, forest=forest)[0]
    torch.testing.assert_close(CANDIDATES[name](None, q, k, v, None, forest=forest)[0], wanted, atol=1e-5, rtol=1e-5)


def test_the_readmes_tables_are_those_of_the_committed_results():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=REPO)
    assert done.returncode == 0, "run benchmarks/tables.py"
