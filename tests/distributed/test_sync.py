"""reference.sync: the moving reference of TR-DPO, held against a loop written out in plain torch; and it is resumed
with the run."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import dpo_dist, metrics, train_on, write_rows, write_tiny_llama
from test_resume import STEPS, killed_after, model_digest

pytestmark = pytest.mark.distributed

PAIRS, BETA, LR, EPS, ALPHA, EVERY, MOVES = 12, 0.5, 1e-2, 1e-3, 0.6, 2, 5


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "reference.mode=live",
            f"loss.beta={BETA}", f"optim.lr={LR}", f"optim.eps={EPS}", "optim.weight_decay=0.1",
            "optim.schedule=constant", "optim.warmup_ratio=0", "train.tokens_per_microbatch=300"]


def plain_tr_dpo(tmp_path: Path, alpha: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, final weights): arXiv 2404.09656 as it stands there, every pair in every step, in float64."""
    from transformers import LlamaForCausalLM

    from dpo_dist.logps import plain_token_logps

    policy, reference = (LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    def margin(model, row) -> torch.Tensor:
        prompt, chosen, rejected = (torch.tensor(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        return plain_token_logps(model, prompt, chosen).sum() - plain_token_logps(model, prompt, rejected).sum()

    losses = []
    for step in range(1, MOVES + 1):
        with torch.no_grad():
            fixed = torch.stack([margin(reference, row) for row in rows])
        loss = -torch.nn.functional.logsigmoid(BETA
                                               * (torch.stack([margin(policy, row) for row in rows]) - fixed)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            with torch.no_grad():
                for moved, leading in zip(reference.parameters(), policy.parameters(), strict=True):
                    moved.copy_(alpha * leading + (1 - alpha) * moved)
        losses.append(loss.item())
    return losses, policy.state_dict()


@pytest.mark.parametrize(("zero", "engine", "world", "mode"), [
    ("none", "hf", 1, "soft"), ("zero3", "zero", 2, "hard"), ("zero3", "hf", 2, "soft"), ("zero2", "zero", 2, "soft")])
def test_a_moving_reference_gives_what_a_plain_loop_gives(zero: str, engine: str, world: int, mode: str, tmp_path: Path,
                                                          words: list[str]):
    from safetensors.torch import load_file

    wanted, weights = plain_tr_dpo(tmp_path, ALPHA if mode == "soft" else 1.0)
    sync = [f"reference.sync.mode={mode}", f"reference.sync.every_steps={EVERY}"]
    sync += [f"reference.sync.alpha={ALPHA}"] if mode == "soft" else []
    dpo_dist(*words, *sync, f"zero={zero}", f"reference={engine}", f"cluster.procs_per_node={world}",
             f"train.pairs_per_step={PAIRS}", f"train.max_steps={MOVES}", f"run.dir={tmp_path / 'run'}")
    assert [row["loss"] for row in metrics(tmp_path / "run")] == pytest.approx(wanted, abs=1e-6)
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert max((trained[name] - weights[name]).abs().max().item() for name in trained) < 1e-6
    passport = json.loads((tmp_path / "run" / "run.json").read_text())["passport"]
    assert passport["reference_sync"] == {"soft": "soft: alpha 0.6, every 2 steps (TR-DPO)",
                                          "hard": "hard: every 2 steps (TR-DPO)"}[mode]


def test_a_killed_run_goes_on_with_the_reference_where_it_was(tmp_path: Path, words: list[str]):
    write_tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=128)
    write_rows(tmp_path / "rows.jsonl", 100, longest=80)
    words = [*words, "reference=zero", "reference.sync.mode=soft", "reference.sync.alpha=0.5",
             "reference.sync.every_steps=2", "optim.lr=1e-3", "train.pairs_per_step=24", f"train.max_steps={STEPS}",
             "train.save_every_steps=1"]
    dpo_dist(*words, "cluster.procs_per_node=2", f"run.dir={tmp_path / 'straight'}")
    killed_after(3, [*words, "cluster.procs_per_node=2"], tmp_path / "killed")
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    assert "resumed from step-" in dpo_dist(*words, "cluster.procs_per_node=2", f"run.dir={tmp_path / 'killed'}").stdout
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")
    dpo_dist(*words, "cluster.procs_per_node=1", "reference=hf", f"run.dir={tmp_path / 'other'}")
    assert ([row["loss"] for row in metrics(tmp_path / "other")]
            == pytest.approx([row["loss"] for row in metrics(tmp_path / "straight")], rel=1e-4, abs=1e-5))
