"""What `auto` becomes: the least that has to be done for the predicted memory to fit."""
from __future__ import annotations

from dataclasses import replace

import pytest

from dpo_dist.config.compose import compose
from dpo_dist.config.schema import RunConfig
from dpo_dist.sizing.automatic import choose, stages, without_sizes
from dpo_dist.sizing.estimate import memory
from dpo_dist.sizing.hardware import CPU, GPU_80GB, Hardware
from dpo_dist.sizing.lengths import Lengths, Packs
from dpo_dist.sizing.one_process import one_process_line
from dpo_dist.sizing.shape import model_shape

EIGHT = model_shape({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256})
SMALL = model_shape({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                     "tie_word_embeddings": True})
LENGTHS = Lengths(1024, 1024, 768, 1000, "made up")


def config(*overrides: str) -> RunConfig:
    return compose(["model.path=nowhere", "train.pairs_per_step=256", "train.tokens_per_microbatch=16384", *overrides])


def chosen(config: RunConfig, ranks: int, shape=EIGHT, device=GPU_80GB) -> tuple[object, object]:
    done = choose(config, shape, LENGTHS, Hardware(1, ranks, device)).config
    return done.zero.stage, done.model.gradient_checkpointing


def test_nothing_is_recomputed_where_all_fits():
    assert chosen(config("zero=zero3", "train.tokens_per_microbatch=4096"), 64) == (3, False)


def test_on_a_cpu_memory_is_not_counted_and_nothing_is_recomputed():
    given = config("zero=auto", "cluster.device=cpu")
    assert chosen(given, 1, device=CPU) == (None, False)
    assert chosen(given, 2, device=CPU) == (0, False)


def test_as_many_layers_are_recomputed_as_memory_demands_and_no_more():
    given = config("zero=zero3", "train.tokens_per_microbatch=32768")
    stage, layers = chosen(given, 8)
    assert stage == 3 and not isinstance(layers, bool) and 0 < layers < 32

    def fits(n: int) -> bool:
        recomputing = replace(given, model=replace(given.model, gradient_checkpointing=n))
        return memory(recomputing, EIGHT, LENGTHS, Hardware(1, 8, GPU_80GB)).fits(GPU_80GB)

    assert fits(layers) and not fits(layers - 1)


def test_the_lowest_stage_that_fits_is_taken():
    assert chosen(config("zero=auto"), 8, SMALL)[0] == 2
    assert chosen(config("zero=auto"), 1, SMALL)[0] is None
    large = replace(EIGHT, layers=80, hidden=8192, intermediate=28672, layer=855_654_400)
    assert chosen(config("zero=auto"), 64, large)[0] == 3


def test_what_a_person_sets_stays_and_only_the_rest_is_chosen():
    assert chosen(config("zero=auto", "model.gradient_checkpointing=true"), 8)[1] is True
    assert chosen(config("zero=zero3", "model.gradient_checkpointing=7"), 8) == (3, 7)
    assert choose(config("zero=zero3", "model.gradient_checkpointing=7"), EIGHT, LENGTHS,
                  Hardware(1, 8, GPU_80GB)).line is None


def test_the_line_names_the_keys_and_the_predicted_memory():
    line = choose(config("zero=auto"), SMALL, LENGTHS, Hardware(1, 8, GPU_80GB)).line
    assert line is not None
    assert line.startswith("memory: zero.stage=2, model.gradient_checkpointing=")
    assert "GiB a rank, of 74.5" in line


def test_where_nothing_fits_the_least_is_taken_and_the_line_says_so():
    choice = choose(config("zero=auto"), EIGHT, LENGTHS, Hardware(1, 1, GPU_80GB))
    assert choice.config.zero.stage is None and choice.config.model.gradient_checkpointing is True
    assert choice.line is not None and "more than there is" in choice.line


def test_a_model_of_unknown_sizes_takes_the_least_on_a_gpu_and_the_fastest_on_a_cpu():
    there = without_sizes(config("zero=auto"), 8, True, "model_type=new")
    assert (there.config.zero.stage, there.config.model.gradient_checkpointing) == (3, True)
    assert there.line is not None and "model_type=new" in there.line
    given = without_sizes(config("zero=auto", "cluster.device=cpu"), 2, False, "model_type=new").config
    assert (given.zero.stage, given.model.gradient_checkpointing) == (0, False)


@pytest.mark.parametrize(("overrides", "ranks", "width", "wanted"), [
    ((), 1, 2, [None]), ((), 8, 2, [2, 3]), ((), 8, 4, [0, 1, 2, 3]), (("zero.offload_parameters=cpu",), 8, 2, [3]),
    (("zero.offload_optimizer=cpu",), 1, 2, [2]), (("zero.secondary_partition=8",), 16, 2, [3]),
    (("zero.stage=1",), 8, 2, [1])])
def test_stages_that_other_keys_rule_out_are_not_chosen(overrides: tuple[str, ...], ranks: int, width: int,
                                                        wanted: list[int | None]):
    assert stages(config("zero=auto", *overrides), ranks, width) == wanted


def test_the_largest_pack_bounds_the_choice_where_pairs_are_uneven():
    given = config("train.pairs_per_step=8")
    packs = Packs.largest(given, LENGTHS, 9000, 8)
    assert packs.tokens == 9000 and Packs.largest(given, LENGTHS, 20000, 8).tokens == 20000


def advice(*overrides: str, nodes: int = 1, ranks: int = 2, device=CPU) -> str | None:
    return one_process_line(config("cluster.device=cpu", "model.gradient_checkpointing=false", *overrides), SMALL,
                            Lengths(80, 40, 40, 96, "short pairs"), Hardware(nodes, ranks, device))


def test_a_cpu_whose_processes_wait_for_each_other_is_told_that_one_is_faster():
    line = advice("zero=zero3", "train.pairs_per_step=8")
    assert line and "zero=none cluster.procs_per_node=1" in line
    assert "2 processes send 3.7 GiB a step" in line      # half of 0.49 B weights and gradients, each


@pytest.mark.parametrize("otherwise", [
    {"ranks": 1}, {"nodes": 2}, {"device": GPU_80GB}], ids=str)
def test_no_other_machine_is_told_so(otherwise: dict):
    assert advice("zero=zero3", "train.pairs_per_step=8", **otherwise) is None


@pytest.mark.parametrize("overrides", [
    ["train.pairs_per_step=512"],                                       # computing takes most of the step
    ["train.pairs_per_step=8", "zero.offload_optimizer=cpu"], ["train.pairs_per_step=8", "reference=zero"]], ids=str)
def test_nobody_is_told_so_where_it_gains_little_or_keys_would_lose_their_meaning(overrides: list[str]):
    assert advice("zero=zero3", *overrides) is None
