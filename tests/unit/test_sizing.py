"""Sizes are sums of named terms, each checked against a hand count; what does not fit is named with the smallest change
that does."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import train_on

from dpo_dist.config.compose import compose
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.prepare import prepare
from dpo_dist.sizing.estimate import bucket_elements, cache_bytes, memory, reference_weights, scoring_memory
from dpo_dist.sizing.hardware import CPU, GPU_80GB, Hardware
from dpo_dist.sizing.lengths import Lengths, Packs, worst_lengths
from dpo_dist.sizing.report import report, smallest_change, token_lengths
from dpo_dist.sizing.shape import ModelShape, model_shape
from dpo_dist.sizing.step_time import pair_flops, step_time

REPO = Path(__file__).resolve().parents[2]
LENGTHS = Lengths(256, 128, 128, 1000, "made up")
SHAPE = model_shape({"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
                     "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192,
                     "tie_word_embeddings": False})
N = 21_238_272
BUCKET = 2 * 3_212_288                 # two layers, on a CPU
TWO = Hardware(1, 2, CPU)


def config(*overrides: str) -> RunConfig:
    return compose(["model.path=nowhere", "cluster.device=cpu", "train.pairs_per_step=4",
                    "train.tokens_per_microbatch=1024", "model.gradient_checkpointing=false", *overrides])


def published(name: str) -> ModelShape:
    return model_shape(json.loads((REPO / "docs" / "shapes" / name / "config.json").read_text()))


@pytest.mark.parametrize(("stage", "weights", "master", "optimizer", "gradients", "reduction", "update"), [
    # gradients appear in backward and go with the step
    ("null", 4 * N, 0, 8 * N, 0, 4 * N, 4 * N),
    ("0", 4 * N, 0, 8 * N, 0, 8 * N, 4 * N),                          # and are all-reduced in a flat copy
    # bucket and its copy, and what earlier ones brought; the partition and its flat copy
    ("2", 4 * N, 2 * N, 4 * N, 0, 8 * BUCKET + 2 * N, 4 * N),
    # two ranks: halves; the bucket stays; two flat copies
    ("3", 2 * N, 2 * N, 4 * N, 2 * N, 8 * BUCKET, 2 * N)])
def test_model_terms_in_fp32_on_two_ranks(stage: str, weights: int, master: int, optimizer: int, gradients: int,
                                          reduction: int, update: int):
    need = memory(config(f"zero.stage={stage}"), SHAPE, LENGTHS, TWO)
    assert SHAPE.parameters == N
    assert (need.weights, need.master_weights, need.optimizer, need.gradients, need.reduction, need.update) == (
        weights, master, optimizer, gradients, reduction, update)
    assert need.buckets == (4 * BUCKET if stage == "3" else 0) and need.gathered == (4 * N if stage == "3" else 0)
    assert need.in_flight == need.buckets, "as much as DeepSpeed gathers ahead"


def test_gradients_are_held_from_one_micro_step_to_the_next():
    one, many = (memory(config("zero.stage=0", f"train.pairs_per_step={pairs}"), SHAPE, LENGTHS, TWO)
                 for pairs in (4, 8))
    assert (one.gradients, many.gradients) == (0, 4 * N)
    assert one.moments["gradients are reduced"] == many.moments["gradients are reduced"]       # there they are anyhow


def test_bf16_keeps_fp32_master_weights_and_halves_the_rest():
    need = memory(config("zero.stage=3", "cluster.device=auto"), SHAPE, LENGTHS, Hardware(1, 2, GPU_80GB))
    assert (need.weights, need.master_weights, need.optimizer, need.gradients) == (N, 2 * N, 4 * N, 2 * N)
    # a GPU's buffer costs what is asked for
    assert need.buckets == 2 * bucket_elements(SHAPE.layer, overlaps=True)


def test_offloading_moves_terms_to_the_host_and_lora_leaves_only_adapters_to_train():
    gpu = Hardware(1, 2, GPU_80GB)
    offloaded = config("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu",
                       "cluster.device=auto")
    there = memory(offloaded, SHAPE, LENGTHS, gpu)
    assert (there.weights, there.master_weights, there.optimizer, there.gradients) == (0, 0, 0, 0)
    assert there.host == (2 + 4 + 8 + 4) * N / 2
    lora = memory(config("zero.stage=0", "model.lora.rank=8"), SHAPE, LENGTHS, TWO)
    adapters = 4 * 8 * (4 * (512 + 512) + 3 * (512 + 1408))
    assert (lora.weights, lora.optimizer) == (4 * (N + adapters), 8 * adapters)


def test_weights_in_4_bits_with_their_scales_are_whole_at_first_and_a_matrix_is_made_whole_while_it_multiplies():
    gpu, adapters = Hardware(1, 2, GPU_80GB), 4 * 8 * (4 * (512 + 512) + 3 * (512 + 1408))
    linear = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
    scales = linear / 64 + 4 * linear / (64 * 256)
    keys = ["model.lora.rank=8", "model.quantization=nf4", "cluster.device=auto"]
    whole, sharded = (memory(config(f"zero.stage={stage}", *keys), SHAPE, LENGTHS, gpu) for stage in (2, 3))
    assert whole.weights == 2 * (N - linear + adapters) + linear / 2 + scales
    assert sharded.weights == pytest.approx((whole.weights - scales) / 2 + scales)
    assert (whole.loading, sharded.loading) == (0, whole.weights - sharded.weights)
    assert sharded.moments["the model is loaded"] == sharded.framework + whole.weights
    assert whole.dequantized == sharded.dequantized == 2 * 512 * 1408
    scored = reference_weights(config("zero.stage=2", *keys), SHAPE, gpu)
    assert scored == whole.weights - 2 * adapters
    assert reference_weights(config("zero.stage=2", "reference.path=full", *keys), SHAPE, gpu) == 2 * N


def test_activations_of_a_pack_and_with_checkpointing():
    tokens, h, inner, heads = 1024, 512, 1408, 8
    mask = 2 * 128 * (256 + 128) / 512
    # norms, q, k and v twice, out twice, MLP; statistics
    layer = 4 * (6 * h + h + 2 * 2 * h + 2 * h + 4 * inner + mask) + 4 * (2 + heads)
    whole = memory(config("zero.stage=0"), SHAPE, LENGTHS, TWO)
    assert whole.activations == pytest.approx(tokens * (4 * layer + 3 * 4 * h))
    checkpointed = memory(config("zero.stage=0", "model.gradient_checkpointing=true"), SHAPE, LENGTHS, TWO)
    assert checkpointed.activations == pytest.approx(tokens * (4 * 4 * h + 3 * 4 * h))
    assert (whole.recomputed, checkpointed.recomputed) == (0, pytest.approx(tokens * layer))


def test_the_head_never_holds_more_than_a_block_of_logits():
    wide = replace(SHAPE, vocabulary=10**6, head=10**6 * 512)
    need = memory(config("zero.stage=0", "model.lora.rank=8"), wide, LENGTHS, TWO)
    # a block in fp32 and its exponentials, and the rows it is made from
    assert need.head == 8 * 512 * 32_768 + 512 * 512 * 4


def test_traffic_is_that_of_rings():
    def sent(*overrides: str) -> float:
        return step_time(config(*overrides), SHAPE, LENGTHS, TWO).sent

    assert sent("zero.stage=0") == 2 * 4 * N / 2                         # an all-reduce: (w - 1) / w there and back
    assert sent("zero.stage=2") == 3 * 4 * N / 2                         # and the weights gathered
    assert sent("zero.stage=3") == 2 * 4 * N / 2          # gathered once: all may stay; gradients scattered
    assert sent("zero.stage=3", "train.pairs_per_step=8") == 2 * sent("zero.stage=3")         # at every micro-step
    large = published("llama-3.1-70b")
    both = [config("zero.stage=3", f"model.gradient_checkpointing={again}") for again in ("false", "true")]
    gathered = [step_time(case, large, LENGTHS, TWO).sent / (2 * large.parameters) for case in both]
    assert gathered == [2 + 1, 3 + 1]                                    # the last: layers again
    assert step_time(config("zero.stage=null"), SHAPE, LENGTHS, Hardware(1, 1, CPU)).sent == 0


def test_checkpointing_costs_the_layers_forward_once_more():
    plain, again = (pair_flops(SHAPE, LENGTHS, False, recomputed) for recomputed in (0.0, 1.0))
    head = 2 * 8192 * 512 * 256
    assert again - plain == pytest.approx(plain / 3 - head)


def test_packs_hold_whole_pairs():
    assert Packs.of(config("train.pairs_per_step=64", "train.tokens_per_microbatch=1500"), LENGTHS,
                    8) == Packs(1024, 4, 0.5)


def test_the_cache_holds_four_bytes_a_completion_token():
    assert cache_bytes(LENGTHS) == 1000 * (256 * 4 + 48) and cache_bytes(worst_lengths(2048)) is None


@pytest.mark.parametrize(("overrides", "ranks", "wanted"), [
    (("zero.stage=3",), 8, ()),                                         # 8B in ZeRO-3 on 8 GPUs fits
    (("zero.stage=0",), 8, ("zero.stage=2",)),                          # stage 1 holds the whole gradient in fp32
    (("zero.stage=3", "train.tokens_per_microbatch=32768"), 8, ("train.tokens_per_microbatch=8192",)),
    (("zero.stage=0",), 1, ("zero.stage=1", "zero.offload_optimizer=cpu"))])
def test_the_smallest_change_that_fits_is_named(overrides: tuple[str, ...], ranks: int, wanted: tuple[str, ...]):
    eight = model_shape({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
                         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                         "vocab_size": 128256})
    given = config("cluster.device=auto", "train.pairs_per_step=256", *overrides)
    world = Hardware(1, ranks, GPU_80GB)
    change = smallest_change(given, eight, LENGTHS, world)
    assert change is not None and change.words == wanted
    assert memory(change.config, eight, LENGTHS, world).fits(GPU_80GB)
    assert any("does not fit" in line for line in report(given, eight, LENGTHS, world)) == bool(wanted)


def test_more_nodes_are_the_last_resort():
    given, model = config("cluster.device=auto", "zero.stage=3",
                          "train.tokens_per_microbatch=512"), published("llama-3.1-405b")
    # 18 bytes a parameter are 7.3 TB: too much for a host, too
    change = smallest_change(given, model, LENGTHS, Hardware(1, 8, GPU_80GB))
    assert change is not None and change.nodes > 1 and change.words[-1] == f"cluster.nodes={change.nodes}"
    fewer = Hardware(change.nodes // 2, 4 * change.nodes, GPU_80GB)
    everything = replace(given.zero, offload_optimizer="cpu", offload_parameters="cpu")
    most = replace(given, zero=everything, model=replace(given.model, gradient_checkpointing=True))
    assert not memory(most, model, LENGTHS, fewer).fits(GPU_80GB)


def test_a_reference_that_does_not_fit_names_the_engine_that_does():
    given = config("cluster.device=auto", "zero.stage=3", "model.gradient_checkpointing=true")
    world = Hardware(8, 64, GPU_80GB)
    assert scoring_memory(given, published("llama-3.1-70b"), LENGTHS, world) > GPU_80GB.memory
    assert any("set reference=zero" in line for line in report(given, published("llama-3.1-70b"), LENGTHS, world))


def test_the_reference_takes_what_its_engine_holds():
    large, gpus = published("llama-3.1-70b"), Hardware(8, 64, GPU_80GB)
    whole = 2 * large.parameters

    def weights(*words: str) -> float:
        return reference_weights(config("cluster.device=auto", *words), large, gpus)

    assert ((weights(), weights("reference=zero"), weights("reference=tensor_parallel"))
            == (whole, whole / 64, whole / 8))
    assert weights("reference=tensor_parallel", "reference.tensor_parallel_size=4") == whole / 4
    assert weights("reference=vllm") == 0 < weights("reference.offload=disk") < whole / 30
    live = config("cluster.device=auto", "reference=tensor_parallel", "reference.mode=live")
    assert memory(live, large, LENGTHS, gpus).reference == whole / 8


def test_lengths_come_from_tokenized_data_where_there_is_some(tmp_path: Path):
    lengths = ((4, 2, 1), (2, 4, 3))
    rows = [{key: [5] * n for key, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)}
            for row in lengths]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.cache_dir={tmp_path / 'tokens'}", train_on(tmp_path / "rows.jsonl")]
    given = config(*words, "data.max_length=100")
    assert token_lengths(given) == worst_lengths(100)
    prepare(given.data, None, None)
    found = token_lengths(given)
    assert (found.prompt, found.chosen, found.rejected, found.pairs) == (3, 3, 2, 2)
    cut_otherwise = token_lengths(config(*words, "data.max_length=50"))
    assert cut_otherwise == worst_lengths(50), "cut otherwise, they would have other lengths"


def test_plan_answers_without_torch():
    program = ("import sys; from dpo_dist.launcher.cli import main; code = main(sys.argv[1:]); "
               "assert 'torch' not in sys.modules; sys.exit(code)")
    words = [sys.executable, "-c", program, "plan", "model.path=docs/shapes/llama-3.1-405b", "cluster=slurm",
             "cluster.nodes=16"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert "405.85 B parameters" in done.stdout and "does not fit" in done.stdout and "fits with" in done.stdout


def test_plan_says_why_where_sizes_cannot_be_predicted(tmp_path: Path):
    from dpo_dist.sizing.report import sizing_lines

    assert "no config.json" in sizing_lines(config(f"model.path={tmp_path}"), 2)[0]
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model_type=mamba" in sizing_lines(config(f"model.path={tmp_path}"), 2)[0]


def test_the_tables_of_the_document_are_current():
    sys.path.insert(0, str(REPO / "docs"))
    import large_models

    document = (REPO / "docs" / "large_models.md").read_text()
    assert large_models.filled(document) == document
