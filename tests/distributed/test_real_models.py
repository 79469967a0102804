"""Models as people have them train the same numbers in every stage and engine, and come out whole. Each test is the
real command."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, metrics, train_on, write_rows, write_text_and_image, write_tiny_llama

pytestmark = pytest.mark.distributed

SHARDED = ("zero=zero3", "cluster.procs_per_node=2", "zero.persistence_threshold=0")
TOLD = "config.json says tie_word_embeddings=true, but the weight files hold an output head"


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_rows(tmp_path / "rows.jsonl", 12, vocabulary=60)
    write_rows(tmp_path / "held_out.jsonl", 5, vocabulary=60, seed=1)
    return [*base, f"model.path={tmp_path / 'm'}", train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=4", "train.max_steps=3", "optim.lr=1e-3",
            "train.tokens_per_microbatch=200"]


def falsely_tied(folder: Path) -> Path:
    """A model whose config.json says tied, and whose file holds two matrices."""
    write_tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def run(words: list[str], run_dir: Path, *more: str) -> list[float]:
    done = dpo_dist("train", *words, *more, f"run.dir={run_dir}")
    assert done.stdout.count(TOLD) == (1 if "falsely" in str(words) else 0)
    return [row[name] for row in metrics(run_dir) + metrics(run_dir, "eval")
            for name in ("loss", "grad_norm", "logps/chosen") if name in row]


def test_a_model_that_is_falsely_said_to_be_tied_is_one_model_everywhere(tmp_path: Path, words: list[str]):
    import torch
    from transformers import AutoModelForCausalLM

    folder = falsely_tied(tmp_path / "falsely")
    words = [word.replace(str(tmp_path / "m"), str(folder)) for word in words]
    plain = run(words, tmp_path / "plain", "zero=none")
    assert run(words, tmp_path / "z3", *SHARDED, "reference=zero", "reference.mode=live") == pytest.approx(
        plain, rel=2e-5, abs=1e-5)
    evals = {}
    for stage in ("zero2", "zero3"):
        dpo_dist("eval", *words, f"zero={stage}", *SHARDED[1:2], f"run.dir={tmp_path / stage}")
        evals[stage] = json.loads((tmp_path / stage / "eval.json").read_text())["logps/chosen"]
    assert evals["zero2"] == pytest.approx(evals["zero3"], rel=1e-6)
    scored = [dpo_dist("score", *words, f"reference={engine}", *more, f"run.dir={tmp_path / 's'}",
                       f"reference.cache_dir={tmp_path / engine}").stdout for engine, more in
              (("tensor_parallel", SHARDED[1:2]), ("hf", ("reference.offload=disk",)))]
    assert all(out.strip().endswith("scored 34, cached 0") for out in scored)
    exported = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("plain", "z3")]
    with torch.no_grad():
        one, two = (model(torch.arange(3, 30)[None]).logits for model in exported)
    assert (one - two).abs().max() < 1e-4
    assert exported[1].config.tie_word_embeddings is False
    assert exported[1].lm_head.weight is not exported[1].model.embed_tokens.weight


def test_text_trains_a_text_and_image_model_alike_in_every_stage_and_it_is_exported_whole(tmp_path: Path,
                                                                                         words: list[str]):
    from transformers import AutoModelForImageTextToText

    write_text_and_image(tmp_path / "m")
    plain = run(words, tmp_path / "plain", "zero=none")
    for stage, more in (("zero1", SHARDED[1:2]), ("zero2", SHARDED[1:2]), ("zero3", SHARDED[1:])):
        assert run(words, tmp_path / stage, f"zero={stage}", *more, "reference=zero") == pytest.approx(
            plain, rel=2e-5, abs=1e-5), stage
    lora = ["model.lora.rank=4", "reference=adapter_off"]
    assert run(words, tmp_path / "lora3", *SHARDED, *lora) == pytest.approx(
        run(words, tmp_path / "lora", "zero=none", *lora), rel=2e-5, abs=1e-5)
    before, after = (AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
                     for name in ("m", "zero3/model"))
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert changed and not any("vision" in name or "projector" in name for name in changed)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "zero3" / "model" / name).read_text() == (tmp_path / "m" / name).read_text()
    refused = dpo_dist("score", *words, "reference=tensor_parallel", "cluster.procs_per_node=2",
                       f"reference.cache_dir={tmp_path / 'other'}", f"run.dir={tmp_path / 's'}", code=2)
    assert "cannot split" in refused.stderr and "set reference=zero" in refused.stderr


def test_a_text_and_image_run_goes_on_from_a_checkpoint_of_another_number_of_ranks(tmp_path: Path, words: list[str]):
    """Frozen weights are not in checkpoints: they come from the model's folder again."""
    write_text_and_image(tmp_path / "m")
    words = [*words, "train.save_every_steps=2", *SHARDED]
    whole = run(words, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    for name in ("DONE", "model"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run([*words, "cluster.procs_per_node=1"], tmp_path / "run") == pytest.approx(whole, rel=1e-5, abs=1e-5)
