"""One log-prob: whatever splits, shards or streams the reference, its values are those of the plain forward."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import dpo_dist, forked_ranks, metrics, train_on, write_rows, write_tiny_llama, write_tiny_qwen2

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Llama and Qwen2 with grouped heads, embeddings tied and not, with four key-value heads so that four ranks can
    split them, and a vocabulary that makes embeddings and head large enough for ZeRO-3 to shard them."""
    folder = tmp_path_factory.mktemp("models")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": 4096}
    return [write(folder / f"{name}-{'tied' if tied else 'untied'}", tie_word_embeddings=tied, **heads)
            for name, write in (("llama", write_tiny_llama), ("qwen2", write_tiny_qwen2)) for tied in (False, True)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_engine_agrees_with_the_plain_forward(models: list[Path], processes: int):
    used = models if processes == 2 else [models[0], models[3]]
    shown = forked_ranks(processes, Path(__file__).with_name("engines_side_by_side.py"), *used)
    rows = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    sizes = {1: 1, 2: 2, 4: 3}[processes]
    assert len(rows) == len(used) * (5 + 2 * sizes)
    for row in rows:
        assert row["error"] < 1e-5, row
    held = {(row["model"], row["size"]): row["held"] for row in rows if row["size"]}
    for (model, size), parameters in held.items():
        assert size == 1 or parameters < (0.5 / size + 0.5) * held[model, 1], "a rank of a team holds its slices only"


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_rows(tmp_path / "rows.jsonl", 16)
    return [f"model.path={write_tiny_llama(tmp_path / 'm')}", *base, train_on(tmp_path / "rows.jsonl")]


def test_a_split_reference_scores_live_beside_a_sharded_policy(tmp_path: Path, words: list[str]):
    """Another model as reference, so that the margins of the first step are not 0; the whole reference in one process
    says what they are."""
    write_tiny_llama(tmp_path / "ref", seed=5)
    live = ["train", *words, f"reference.path={tmp_path / 'ref'}", "reference.mode=live", "train.pairs_per_step=8",
            "train.max_steps=3", "optim.lr=1e-3", "train.tokens_per_microbatch=100"]
    dpo_dist(*live, "zero=none", f"run.dir={tmp_path / 'whole'}")
    dpo_dist(*live, "reference=tensor_parallel", "cluster.procs_per_node=2", f"run.dir={tmp_path / 'split'}")
    for name in ("loss", "rewards/margins", "rewards/chosen", "grad_norm"):
        assert ([row[name] for row in metrics(tmp_path / "split")]
                == pytest.approx([row[name] for row in metrics(tmp_path / "whole")], rel=2e-5, abs=2e-5))


def test_a_split_reference_fills_the_cache_that_the_whole_one_reads(tmp_path: Path, words: list[str]):
    score = ["score", *words, f"run.dir={tmp_path / 'score'}"]
    split = dpo_dist(*score, "reference=tensor_parallel", "cluster.procs_per_node=2", "train.tokens_per_microbatch=60")
    assert split.stdout.strip().endswith("scored 32, cached 0")
    assert dpo_dist(*score).stdout.strip().endswith("scored 0, cached 32")
    dpo_dist(*score, "reference=tensor_parallel", "cluster.procs_per_node=2", "model.dtype=bf16")
    recipes = {json.loads(file.read_text())["recipe"] for file in (tmp_path / "reference").rglob("key.json")}
    assert recipes == {"torch, softmax in fp32, v1",
                       "torch, softmax in fp32, v1, layers split over 2 ranks"}, "bf16 sums round otherwise"


def test_what_a_team_of_ranks_cannot_divide_is_refused_by_name(tmp_path: Path, words: list[str]):
    score = ["score", *words, f"run.dir={tmp_path / 'score'}", "reference=tensor_parallel"]
    done = dpo_dist(*score, "reference.tensor_parallel_size=3", code=2)
    assert "reference.tensor_parallel_size=3 does not divide the 1 processes of a node" in done.stderr
    write_tiny_llama(tmp_path / "ref", num_key_value_heads=1)
    done = dpo_dist(*score, "cluster.procs_per_node=2", f"reference.path={tmp_path / 'ref'}", code=2)
    assert "reference.tensor_parallel_size=2 does not divide the reference's 1 num_key_value_heads" in done.stderr


def test_an_architecture_that_deepspeed_splits_wrongly_is_refused(tmp_path: Path, words: list[str]):
    """OLMo 2 norms its queries over all heads, which a slice of them cannot do alone."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    Olmo2ForCausalLM(Olmo2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, pad_token_id=0, bos_token_id=2,
                                 eos_token_id=1)).save_pretrained(tmp_path / "ref")
    done = dpo_dist("score", *words, f"run.dir={tmp_path / 'score'}", "reference=tensor_parallel",
                    "cluster.procs_per_node=2", f"reference.path={tmp_path / 'ref'}", code=2)
    assert "does not fit this reference, a olmo2" in done.stderr and "reference=zero" in done.stderr


def test_a_quantized_reference_is_refused_where_its_library_is_missing(tmp_path: Path, words: list[str]):
    write_tiny_llama(tmp_path / "ref")
    config = json.loads((tmp_path / "ref" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "nbits_per_codebook": 16}
    (tmp_path / "ref" / "config.json").write_text(json.dumps(config))
    score = ["score", *words, f"run.dir={tmp_path / 'score'}", f"reference.path={tmp_path / 'ref'}"]
    assert "is quantized (aqlm" in (shown := dpo_dist(*score,
                                                      code=2).stderr) and "aqlm" in shown.split("cannot be computed "
                                                                                                "here")[1]
    assert "set reference=hf" in dpo_dist(*score, "reference=zero", code=2).stderr
