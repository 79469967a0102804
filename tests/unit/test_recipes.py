"""conf/experiment/: the figures are those of the sources that each file names, and each recipe fits where it says."""
from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from huggingface_hub import constants

from dpo_dist.config.compose import choices, compose, conf_dir, experiments
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.launcher.cli import main
from dpo_dist.models.resolve import resolve


@dataclasses.dataclass(frozen=True)
class Source:
    """What the source that a recipe names says, as read there, besides 1 epoch, warm-up 0.1 and clipping at 1."""

    lr: float
    schedule: str
    loss: str
    beta: float
    pairs: int                           # devices x pairs a device x accumulated steps
    length: int
    start: str
    data: str
    other: dict[str, float] = dataclasses.field(default_factory=dict)


TULU, OLMO = "allenai/Llama-3.1-Tulu-3-{}-SFT", "allenai/Olmo-3"
MIXTURE, ULTRA = "allenai/llama-3.1-tulu-3-{}-preference-mixture", "HuggingFaceH4/ultrafeedback_binarized"
SOURCES = {
    "tulu3_8b": Source(5e-7, "linear", "sigmoid_norm", 5, 8 * 1 * 16, 2048, TULU.format("8B"), MIXTURE.format("8b")),
    "tulu3_70b": Source(2e-7, "linear", "sigmoid_norm", 5, 64 * 1 * 2, 2048, TULU.format("70B"), MIXTURE.format("70b")),
    "tulu3_405b": Source(2e-7, "linear", "sigmoid_norm", 5, 256 * 1 * 1, 2048, TULU.format("405B"),
                         MIXTURE.format("405b")),
    "olmo3_7b_instruct": Source(1e-6, "linear", "sigmoid_norm", 5, 32 * 1 * 4, 16384, f"{OLMO}-7B-Instruct-SFT",
                                "allenai/Dolci-Instruct-DPO"),
    "olmo3_7b_think": Source(8e-8, "linear", "sigmoid_norm", 5, 32 * 1 * 4, 16384, f"{OLMO}-7B-Think-SFT",
                             "allenai/Dolci-Think-DPO-7B"),
    "olmo3_32b_instruct": Source(1e-6, "linear", "sigmoid_norm", 5, 64 * 1 * 2, 8192, f"{OLMO}.1-32B-Instruct-SFT",
                                 "allenai/Dolci-Instruct-DPO"),
    "olmo3_32b_think": Source(7e-8, "linear", "sigmoid_norm", 5, 128 * 1 * 1, 8192, f"{OLMO}-32B-Think-SFT",
                              "allenai/Dolci-Think-DPO-32B"),
    "zephyr_7b": Source(5e-7, "cosine", "sigmoid", 0.01, 8 * 8 * 2, 1024, "alignment-handbook/zephyr-7b-sft-full",
                        ULTRA),
    "smollm2_1_7b": Source(1e-6, "cosine", "sigmoid", 0.5, 8 * 2 * 8, 1024, "loubnabnl/smollm2-1.7B-sft", ULTRA,
                           {"train.epochs": 3}),
    "smollm3_3b": Source(1e-6, "cosine", "apo_zero", 0.05, 16 * 1 * 2, 24576,
                         "HuggingFaceTB/SmolLM3-3B-checkpoints@it-SFT", "HuggingFaceTB/smoltalk2",
                         {"optim.min_lr_ratio": 0.1, "optim.max_grad_norm": 0.2}),
    # its gamma_beta_ratio is 0.55, and its loss -log sigmoid(beta (difference - ratio))
    "simpo_llama3_8b": Source(1e-6, "cosine", "simpo", 2.5, 4 * 2 * 16, 2048, "meta-llama/Meta-Llama-3-8B-Instruct",
                              "princeton-nlp/llama3-ultrafeedback", {"loss.simpo_gamma": 0.55 * 2.5}),
}
COMMON = {"train.epochs": 1, "train.max_steps": None, "optim.warmup_ratio": 0.1, "optim.min_lr_ratio": 0,
          "optim.max_grad_norm": 1, "optim.weight_decay": 0, "optim.betas": [0.9, 0.999], "optim.eps": 1e-8,
          "model.lora.rank": 0, "zero.stage": 3, "model.dtype": "bf16"}

LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 8}
OLMO3 = {"model_type": "olmo3", "tie_word_embeddings": False, "vocab_size": 100278, "sliding_window": 4096}
WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "vocab_size": 128256},
    "70B": json.loads((REPO / "docs/shapes/llama-3.1-70b/config.json").read_text()),
    "405B": json.loads((REPO / "docs/shapes/llama-3.1-405b/config.json").read_text()),
    "Mistral 7B": {**LLAMA, "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "sliding_window": 4096},
    "1.7B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True},
    "3B": {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True},
    "OLMo 7B": {**OLMO3, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 32, "layer_types": WINDOWS * 8},
    "OLMo 32B": {**OLMO3, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
                 "num_attention_heads": 40, "num_key_value_heads": 8, "layer_types": WINDOWS * 16},
}
# (shape, billions of parameters)
ARCHITECTURE = {"tulu3_8b": ("8B", 8.03), "tulu3_70b": ("70B", 70.55), "tulu3_405b": ("405B", 405.85),
                "olmo3_7b_instruct": ("OLMo 7B", 7.30), "olmo3_7b_think": ("OLMo 7B", 7.30),
                "olmo3_32b_instruct": ("OLMo 32B", 32.23), "olmo3_32b_think": ("OLMo 32B", 32.23),
                "zephyr_7b": ("Mistral 7B", 7.24), "smollm2_1_7b": ("1.7B", 1.71), "smollm3_3b": ("3B", 3.08),
                "simpo_llama3_8b": ("8B", 8.03)}


def head(name: str) -> str:
    return (conf_dir() / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]


def test_every_experiment_with_a_source_is_held_against_it():
    assert {name for name in choices("experiment") if "# Source: " in head(name)} == SOURCES.keys()
    assert experiments().keys() == set(choices("experiment")), "each says in its first line what it is, for --help"


@pytest.mark.parametrize("name", SOURCES)
def test_the_figures_are_the_sources(name: str):
    source, config = SOURCES[name], compose([f"experiment={name}"])
    assert (config.optim.lr, config.optim.schedule, config.loss.name, config.loss.beta) == (
        source.lr, source.schedule, source.loss, source.beta)
    assert (config.train.pairs_per_step, config.data.max_length, config.model.path) == (
        source.pairs, source.length, source.start)
    assert {data.path for data in (*config.data.train, *config.data.eval)} == {source.data}
    flat = to_dict(config)
    for key, wanted in {**COMMON, **source.other}.items():
        found: Any = flat
        for part in key.split("."):
            found = found[part]
        assert found == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), f"{key} is {found}"
    assert not config.loss.label_smoothing and not config.loss.f_alpha and not config.loss.ld_alpha


def test_the_parts_of_smoltalk2_are_the_shares_that_the_source_takes():
    """230,501 and 216,385 rows by the data set's card; the source takes the shares 0.5 and 0.25."""
    rows = [data.rows for data in compose(["experiment=smollm3_3b"]).data.train]
    assert rows == [int(230501 * 0.5), int(216385 * 0.25)]


@pytest.mark.parametrize("name", SOURCES)
def test_the_longest_pair_is_let_into_a_pack(name: str):
    """Of a prompt of one token and two completions of the rest: nearly twice data.max_length."""
    config = compose([f"experiment={name}"])
    assert config.data.truncation == "keep_start"
    assert config.train.tokens_per_microbatch >= 2 * config.data.max_length - 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_recipe_is_predicted_to_fit_where_it_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kind, billions = ARCHITECTURE[name]
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[kind]))
    said = re.search(r"# Plan: (\d+) nodes? of 8 GPUs with 80 GB: (\d+) GiB a GPU predicted", head(name))
    assert said, "the head of the file has no line '# Plan: ...'"
    assert main(["plan", f"experiment={name}", f"model.path={tmp_path}", "cluster=slurm", f"cluster.nodes={said[1]}",
                 "cluster.procs_per_node=8", f"data.cache_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert f"model     {billions:.2f} B parameters" in shown
    memory = re.search(r"^memory    ([\d.]+) GiB a rank", shown, re.M)
    assert memory and round(float(memory[1])) == int(said[2]), shown
    assert "not fit" not in shown
    assert ("scoring" in shown) == (name != "simpo_llama3_8b")


def test_a_hub_model_may_be_named_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the hub's cache lies on disk: refs name commits, snapshots hold them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for branch, commit in (("main", "a" * 40), ("it-SFT", "b" * 40)):
        (tmp_path / "models--some--model" / "refs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "models--some--model" / "refs" / branch).write_text(commit)
        folder = tmp_path / "models--some--model" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert resolve("some/model", "model.path", offline=True).base.name == "a" * 40
    assert resolve("some/model@it-SFT", "model.path", offline=True).base.name == "b" * 40
    assert resolve(f"some/model@{'b' * 40}", "model.path", offline=True).base.name == "b" * 40
    with pytest.raises(UserError, match="some/model@other is neither a folder nor a model in the local hub cache"):
        resolve("some/model@other", "model.path", offline=True)
