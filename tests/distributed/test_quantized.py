"""Adapters on weights in 4 bits: the numbers of plain peft and bitsandbytes, the step-0 gate, the cache's keys, resume
and export."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import (
    BITSANDBYTES,
    dpo_dist,
    eval_on,
    forked,
    forked_ranks,
    metrics,
    model_digest,
    packages_of,
    train_on,
    write_rows,
    write_tiny_llama,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True, scope="module")
def with_bitsandbytes() -> Iterator[None]:
    with packages_of(BITSANDBYTES):
        yield


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=192, initializer_range=0.1)
    write_rows(tmp_path / "rows.jsonl", 24)
    write_rows(tmp_path / "held_out.jsonl", 6, seed=1)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=8", "train.max_steps=4", "optim.lr=1e-2",
            "loss.beta=0.5", "model.lora.rank=4", "model.quantization=nf4"]


def recipes(tmp_path: Path) -> set[str]:
    """Of the keys under which values are in the cache."""
    return {json.loads(file.read_text())["recipe"].partition("v1, ")[2]
            for file in (tmp_path / "reference").rglob("key.json")}


def losses(run_dir: Path) -> list[float]:
    return [row[name] for row in metrics(run_dir) + metrics(run_dir, "eval") for name in ("loss", "logps/chosen")]


def test_every_stage_trains_as_plain_peft_and_bitsandbytes_do_and_the_merged_export_computes_the_same(tmp_path: Path):
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=192, initializer_range=0.1)
    write_rows(tmp_path / "rows.jsonl", 8)
    program = Path(__file__).with_name("quantized_side_by_side.py")
    assert "all stages agree" in forked_ranks(2, program, tmp_path / "m", tmp_path / "rows.jsonl", tmp_path / "tokens")


def test_the_layers_of_the_language_model_are_in_4_bits_and_exports_have_them_as_the_files_had(tmp_path: Path):
    write_tiny_llama(tmp_path / "narrow", hidden_size=64, intermediate_size=96)
    write_tiny_llama(tmp_path / "wide", hidden_size=128, intermediate_size=192)
    checked = forked(Path(__file__).with_name("quantized_models.py"), tmp_path)
    out, err = checked.communicate(120)
    assert "all models are right" in out, err[-3000:]


def test_the_reference_is_the_same_4_bit_weights_unless_it_has_a_path_and_shares_its_values(tmp_path: Path,
                                                                                           words: list[str]):
    done = dpo_dist("train", *words, "zero=none", f"run.dir={tmp_path / 'hf'}")
    assert "weights: 14 linear layers in 4 bits (nf4), 94% of the model" in done.stdout
    first = metrics(tmp_path / "hf")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert recipes(tmp_path) == {"nf4 by bitsandbytes, double quantization"}

    same = dpo_dist("score", *words, f"run.dir={tmp_path / 'score'}", "reference=adapter_off", "zero=none")
    assert same.stdout.strip().endswith("scored 0, cached 60")
    full = [*words, f"reference.path={tmp_path / 'm'}", "train.max_steps=1", "zero=none"]
    dpo_dist("train", *full, f"run.dir={tmp_path / 'full'}")
    assert recipes(tmp_path) == {"nf4 by bitsandbytes, double quantization", ""}
    assert abs(metrics(tmp_path / "full")[0]["rewards/margins"]) > 1e-3, "another reference: the full weights"


def test_a_run_under_zero_3_resumes_to_the_same_bits_and_its_export_is_evaluated_without_4_bits(tmp_path: Path,
                                                                                                words: list[str]):
    run_dir = tmp_path / "run"
    sharded = ["train", *words, "cluster.procs_per_node=2", "zero=zero3", "zero.persistence_threshold=0",
               "reference=adapter_off", "train.save_every_steps=2", f"run.dir={run_dir}"]
    dpo_dist(*sharded)
    straight = model_digest(run_dir)
    for gone in ("DONE", "checkpoints/step-000004/COMPLETE", "model/model.safetensors"):
        (run_dir / gone).unlink()
    assert "resumed from step-000002" in dpo_dist(*sharded).stdout
    assert model_digest(run_dir) == straight

    exported = run_dir / "model"
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    dpo_dist("eval", *words[1:], f"model.path={exported}", "model.quantization=none", "model.lora.rank=0", "zero=none",
             f"reference.path={tmp_path / 'm'}", f"run.dir={tmp_path / 'eval'}")
    again = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert again["logps/chosen"] == pytest.approx(metrics(run_dir, "eval")[-1]["logps/chosen"], rel=1e-5)


MAKE_QUANTIZED = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=how)
model.save_pretrained(sys.argv[2])
"""


def test_files_that_hold_4_bits_are_trained_on_as_they_are(tmp_path: Path, words: list[str]):
    made = forked("-c", MAKE_QUANTIZED, tmp_path / "m", tmp_path / "q")
    assert made.communicate() and made.returncode == 0
    in_files = [f"model.path={tmp_path / 'q'}", *words[1:], "zero=none"]
    dpo_dist("train", *words, "zero=none", f"run.dir={tmp_path / 'full'}")
    done = dpo_dist("train", *in_files, f"run.dir={tmp_path / 'in_files'}")
    assert "as in the files" in done.stdout and "not exported" not in done.stdout
    assert losses(tmp_path / "in_files") == losses(tmp_path / "full")
    assert model_digest(tmp_path / "in_files") == model_digest(tmp_path / "full")
    assert "quantization_config" not in json.loads((tmp_path / "in_files" / "model" / "config.json").read_text())
    assert recipes(tmp_path) == {"nf4 by bitsandbytes, double quantization",
                                 "bitsandbytes, 4 bits, computed in model.dtype"}
    same = dpo_dist("score", *words, f"reference.path={tmp_path / 'q'}", f"run.dir={tmp_path / 'score'}")
    assert same.stdout.strip().endswith("scored 0, cached 60"), "as a reference they are the same"
    refused = dpo_dist("train", *in_files, "model.quantization=none", f"run.dir={tmp_path / 'no'}", code=2).stderr
    assert "cannot be trained; set model.quantization=nf4 and model.lora.rank=16" in refused


def test_bitsandbytes_that_is_missing_or_too_old_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dpo_dist.config.errors import UserError
    from dpo_dist.models.quantized import check_library

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"model\.quantization=nf4 needs bitsandbytes 0\.50 or newer, but none is "
                                        r"installed; pip install 'dpo-dist\[qlora\]'"):
        check_library("model.quantization=nf4")
    (tmp_path / "bitsandbytes-0.49.2.dist-info").mkdir()
    (tmp_path / "bitsandbytes-0.49.2.dist-info" / "METADATA").write_text("Name: bitsandbytes\nVersion: 0.49.2\n")
    assert version("bitsandbytes") == "0.49.2"
    with pytest.raises(UserError, match=r"but 0\.49\.2 is installed"):
        check_library("model.quantization=nf4")
