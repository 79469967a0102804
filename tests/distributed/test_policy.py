"""Whatever shards, recomputes, adapts or rounds: the run is the same run. Each test is the real command against plain
torch."""
from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest
from conftest import dpo_dist, eval_on, forked_ranks, metrics, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 30)
    write_rows(tmp_path / "held_out.jsonl", 7, seed=1)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=10", "train.max_steps=4", "optim.lr=1e-3",
            "loss.beta=0.5"]


def run(words: list[str], run_dir: Path, *more: str) -> list[float]:
    dpo_dist(*words, *more, f"run.dir={run_dir}")
    return [row[name] for row in metrics(run_dir) + metrics(run_dir, "eval")
            for name in ("loss", "rewards/margins", "logps/chosen")]


def test_step_zero_is_ln_2_and_every_margin_is_0(tmp_path: Path, words: list[str]):
    run(words, tmp_path / "run", "cluster.procs_per_node=2")
    first, held_out = metrics(tmp_path / "run")[0], metrics(tmp_path / "run", "eval")[0]
    assert held_out["step"] == 0
    for row in (first, held_out):
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_metrics_and_the_folder_are_as_the_contract_says(tmp_path: Path, words: list[str]):
    run(words, tmp_path / "run", "zero=none")
    row = metrics(tmp_path / "run")[-1]
    assert {"step", "split", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "logps/chosen", "logps/rejected", "grad_norm", "lr", "perf/pairs_per_second", "perf/tokens_per_second",
            "perf/peak_memory_gib"} <= row.keys()
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"run.json", "metrics.jsonl", "checkpoints", "model",
                                                              "DONE", "logs"}
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["config"]["loss"]["beta"] == 0.5
    assert written["passport"]["policy_weights"] == written["passport"]["reference_weights"]


def test_the_time_of_a_step_is_told_part_by_part_and_mfu_against_a_stated_peak(tmp_path: Path, words: list[str]):
    run(words, tmp_path / "run", "cluster.procs_per_node=2", "cluster.peak_tflops=0.5",
        "train.tokens_per_microbatch=160")
    explained = []
    for row in metrics(tmp_path / "run"):
        parts = [row[f"perf/{part}_seconds"] for part in ("data", "forward", "backward", "wait", "step")]
        assert min(parts[1:]) > 0
        step_pairs = 10
        # means over ranks, against the slowest rank's time
        explained.append(sum(parts) * row["perf/pairs_per_second"] / step_pairs)
        assert 0 < row["perf/mfu"] < 1
        assert row["perf/peak_tflops"] == 0.5
        assert row["perf/busiest_rank"] >= 1
    assert max(explained) <= 1.001 and median(explained) >= 0.7


def test_pairs_of_a_prompt_are_computed_together_and_train_the_same_weights(tmp_path: Path, base: list[str]):
    """Four rated responses of each prompt: with all pairs of a prompt in one step, a prompt and a response are computed
    once."""
    write_tiny_llama(tmp_path / "m")
    r = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as f:
        for prompt in range(8):
            answers = [[*(r.randint(3, 60) for _ in range(r.randint(4, 20))), 1] for _ in range(4)]
            for a, b in combinations(answers, 2):
                f.write(json.dumps({"prompt_ids": [prompt + 3] * 12, "chosen_ids": a, "rejected_ids": b}) + "\n")
    words = ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
             "train.pairs_per_step=12", "train.max_steps=4", "train.tokens_per_microbatch=1000",
             "data.group_by_prompt=true", "reference.mode=live"]
    one = run(words, tmp_path / "one", "zero=none")
    two = run(words, tmp_path / "two", "cluster.procs_per_node=2", "train.tokens_per_microbatch=200")
    assert two == pytest.approx(one, rel=2e-5, abs=2e-5)
    for row in metrics(tmp_path / "one"):
        tokens = row["perf/tokens_per_second"] / row["perf/pairs_per_second"] * 12
        assert tokens <= 2 * (12 + 4 * 21), "two prompts a step, four responses each"


def test_lora_under_zero_3_equals_lora_in_plain_torch_with_the_reference_switched_off_or_cached(tmp_path: Path,
                                                                                                words: list[str]):
    import torch
    from transformers import AutoModelForCausalLM

    lora = ["model.lora.rank=4", "optim.lr=1e-2"]
    plain = run(words, tmp_path / "plain", "zero=none", *lora)
    sharded = run(words, tmp_path / "sharded", "cluster.procs_per_node=2", "reference=adapter_off", *lora)
    live = run(words, tmp_path / "live", "cluster.procs_per_node=2", "reference=adapter_off", "reference.mode=live",
               *lora)
    assert sharded == pytest.approx(plain, rel=2e-5, abs=1e-5)
    assert live == pytest.approx(plain, rel=2e-5, abs=1e-5)
    base, one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / p) for p in ("m", "plain/model", "sharded/model"))
    moved = max((a - b).abs().max().item() for a, b in zip(base.parameters(), one.parameters(), strict=True))
    apart = max((a - b).abs().max().item() for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert moved > 1e-3 and apart < 1e-5
    with torch.no_grad():
        assert torch.isfinite(two(torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("more", [[], ["model.lora.rank=4", "optim.lr=1e-2"]], ids=["full", "lora"])
def test_a_model_whose_head_is_its_embedding_trains_the_same_where_every_weight_is_sharded(
        tmp_path: Path,
        words: list[str], more: list[str]):
    from transformers import AutoModelForCausalLM

    write_tiny_llama(tmp_path / "m", tie_word_embeddings=True)
    plain = run(words, tmp_path / "plain", "zero=none", *more)
    sharded = run(words, tmp_path / "sharded", "cluster.procs_per_node=2", "zero.persistence_threshold=0", *more)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("plain", "sharded")]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-6) and losses[0][-1] < losses[0][0] - 1e-3
    assert sharded == pytest.approx(plain, rel=2e-5, abs=1e-5)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("plain", "sharded"))
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert max((a - b).abs().max().item() for a, b in zip(one.parameters(), two.parameters(), strict=True)) < 1e-5


def test_bf16_runs_close_to_fp32_with_fp32_master_weights(tmp_path: Path, words: list[str]):
    exact = run(words, tmp_path / "fp32", "cluster.procs_per_node=2")
    rounded = run(words, tmp_path / "bf16", "cluster.procs_per_node=2", "model.dtype=bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1, abs=0.3)


def test_a_sort_over_the_step_is_exact_however_the_step_is_cut_up(tmp_path: Path, words: list[str]):
    whole = run(words, tmp_path / "whole", "zero=none", "loss=aot")
    cut = run(words, tmp_path / "cut", "cluster.procs_per_node=3", "loss=aot", "train.tokens_per_microbatch=80")
    assert cut == pytest.approx(whole, rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("loss", ["loss=rpo", "loss=dpo loss.ld_alpha=0.5"])
def test_pairs_of_which_some_tokens_count_train_the_same_however_sharded_and_whatever_knows_the_reference(
        loss: str, tmp_path: Path, words: list[str]):
    r = random.Random(0)
    for path in (tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["chosen_counts"] = [*(r.randint(0, 1) for _ in row["chosen_ids"][1:]), 1]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in words if word != "loss.beta=0.5"] + loss.split()
    one = run(words, tmp_path / "one", "zero=none")
    two = ["cluster.procs_per_node=2", "train.tokens_per_microbatch=100"]
    for name, more in {"live": [*two, "zero.persistence_threshold=0", "reference.mode=live"],
                       "padded": [*two, "model.attention=padded"]}.items():
        assert run(words, tmp_path / name, *more) == pytest.approx(one, rel=2e-5, abs=2e-5), name
    ahead = ["reference.mode=ahead", f"reference.cache_dir={tmp_path / 'ahead_reference'}"]
    assert run(["run", *words[1:]], tmp_path / "ahead", *two, *ahead) == pytest.approx(one, rel=2e-5, abs=2e-5)


def test_sft_is_the_token_mean_over_the_step_and_forwards_no_rejected_completion(tmp_path: Path, words: list[str]):
    words = ["loss=sft" if word == "loss.beta=0.5" else word for word in words]
    for name, more in (("one", ["zero=none"]), ("two", ["cluster.procs_per_node=2", "train.tokens_per_microbatch=80"])):
        dpo_dist(*words, *more, f"run.dir={tmp_path / name}")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-5)
    assert "rewards/chosen" not in one[0] and "logps/rejected" not in one[0]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    seconds = 1 / one[0]["perf/pairs_per_second"] * 10
    assert one[0]["perf/tokens_per_second"] * seconds < 10 * max(len(r["prompt_ids"]) + len(r["chosen_ids"])
                                                                 for r in rows)


def test_reference_free_losses_train_without_any_reference(tmp_path: Path, words: list[str]):
    words = ["loss=simpo" if word == "loss.beta=0.5" else word for word in words]
    dpo_dist(*words, "zero=none", f"run.dir={tmp_path / 'run'}")
    assert metrics(tmp_path / "run")[-1]["rewards/margins"] > metrics(tmp_path / "run")[0]["rewards/margins"]
    assert not (tmp_path / "reference").exists()


def test_an_update_that_the_device_is_told_to_skip_changes_no_weight_in_any_stage(tmp_path: Path):
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 8)
    shown = forked_ranks(2, Path(__file__).with_name("skipped_updates.py"), tmp_path / "m", tmp_path / "rows.jsonl",
                         tmp_path / "tokens")
    assert shown.count(" ok") == 7


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_loss_that_is_not_finite_ends_the_run_names_the_step_and_leaves_the_last_sound_checkpoint(
        zero: str, tmp_path: Path, words: list[str]):
    done = dpo_dist(*words, "cluster.procs_per_node=2", f"zero={zero}", "optim.lr=1e30", "optim.schedule=constant",
                    "optim.warmup_ratio=0", "train.save_every_steps=1", f"run.dir={tmp_path / 'run'}", code=1)
    assert "the loss of step 2 is not finite; no weight was changed" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1], "the step before is logged"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
