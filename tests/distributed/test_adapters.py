"""A LoRA adapter is trained on as plain peft and torch train it, on any number of ranks; another one, frozen, is the
reference; what comes out is a model and an adapter that say the same. Each test is the real command."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, dpo_dist, metrics, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

ROWS, STEPS, RATE, BETA = 10, 3, 1e-2, 0.5
SHARDED = ["zero=zero3", "cluster.procs_per_node=2", "zero.persistence_threshold=0", "train.tokens_per_microbatch=120"]
WHOLE = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA, trained head, embedding and norm": {
        "use_rslora": True, "modules_to_save": ["embed_tokens", "lm_head", "model.norm"]},
    "DoRA, ranks by pattern": {"use_dora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


def write_adapter(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """Saves an adapter as peft does, with random weights, so that it does something."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                                peft.LoraConfig(**{**WHOLE, **settings}, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path | None, trained: bool = False) -> Any:
    """A plain peft model, in fp32 and without dropout."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter, is_trainable=trained)).eval()


def margins(model: Any, rows: list[dict[str, list[int]]]) -> Any:
    """(pairs,) log p(chosen) - log p(rejected)."""
    import torch

    return torch.stack([logps(model, row, "chosen_ids").sum() - logps(model, row, "rejected_ids").sum()
                        for row in rows])


def logps(model: Any, row: dict[str, list[int]], completion: str) -> Any:
    """(tokens,) of a completion, by one plain forward of its sequence."""
    import torch

    prompt = row["prompt_ids"]
    ids = torch.tensor([prompt + row[completion]])
    found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return found[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1:]


def check_same_logps(one: Any, other: Any, rows: list[dict[str, list[int]]]) -> None:
    """Two models give each token of the completions one log-prob."""
    import torch

    with torch.no_grad():
        for row in rows:
            for completion in ("chosen_ids", "rejected_ids"):
                assert (logps(one, row, completion) - logps(other, row, completion)).abs().max() < 1e-5


def trained_plainly(base: Path, adapter: Path, reference: Any, rows: list[dict[str, list[int]]],
                    into: Path) -> list[float]:
    """The losses of some steps over all rows; peft saves what comes of them."""
    import torch

    policy = adapted(base, adapter, trained=True)
    with torch.no_grad():
        wanted = margins(reference, rows)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.95),
                                  eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = -torch.nn.functional.logsigmoid(BETA * (margins(policy, rows) - wanted)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    policy.save_pretrained(into)
    return losses


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, list[int]]]:
    write_tiny_llama(tmp_path / "m")
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def words(tmp_path: Path, base: list[str], rows: object) -> list[str]:
    return ["train", *base, train_on(tmp_path / "rows.jsonl"), f"train.pairs_per_step={ROWS}",
            f"train.max_steps={STEPS}", f"train.epochs={STEPS}", f"optim.lr={RATE}", "optim.schedule=constant",
            "optim.warmup_ratio=0", "optim.weight_decay=0", "optim.max_grad_norm=null", "optim.betas=[0.9,0.95]",
            f"loss.beta={BETA}", "export.what=both"]


def tensors(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def check_same(one: dict[str, Any], other: dict[str, Any], within: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < within


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir)]


CASES = {
    "plain torch, another model for the reference": ("LoRA", ["zero=none", "reference=hf"]),
    "2 processes, ZeRO-2, a second adapter beside the first": (
        "LoRA", ["zero=zero2", "cluster.procs_per_node=2", "reference=adapter"]),
    "2 processes, ZeRO-3, a second adapter, live": (
        "rsLoRA, trained head, embedding and norm", [*SHARDED, "reference=adapter", "reference.mode=live"]),
    "1 process, ZeRO-3, a sharded reference": (
        "rsLoRA, trained head, embedding and norm", [*SHARDED, "cluster.procs_per_node=1", "reference=zero"]),
    "DoRA, 2 processes, ZeRO-3, layers recomputed": (
        "DoRA, ranks by pattern", [*SHARDED, "reference=adapter", "reference.mode=live",
                                   "model.gradient_checkpointing=true"]),
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_with_an_adapter_as_plain_peft_does_and_another_is_the_reference(
        case: str, tmp_path: Path, words: list[str], rows: list[dict[str, list[int]]]):

    kind, more = CASES[case]
    base = tmp_path / "m"
    start, reference = (write_adapter(tmp_path / name, base, seed, **KINDS[kind]) for name, seed in
                        (("start", 1), ("reference_adapter", 2)))
    for folder in (base, start):
        shutil.copyfile(GOLDEN / "policy" / "tokenizer.json", folder / "tokenizer.json")
        settings = json.loads((GOLDEN / "policy" / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "name_or_path": folder.name}))
    wanted = trained_plainly(base, start, adapted(base, reference), rows, tmp_path / "plain")
    run_dir = tmp_path / "run"
    done = dpo_dist(*words, *more, f"model.path={start}", f"reference.path={reference}", f"run.dir={run_dir}")
    assert "lora_dropout=0.3; here it is 0" in " ".join(done.stdout.split())
    assert losses(run_dir) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    check_same(tensors(run_dir / "adapter"), tensors(tmp_path / "plain"))
    assert tensors(run_dir / "adapter").keys() == tensors(start).keys()
    check_same_logps(adapted(run_dir / "model", None), adapted(base, run_dir / "adapter"), rows)
    for name, kept in (("tokenizer_config.json", ("model", "adapter")), ("generation_config.json", ("model",))):
        own = start if name.startswith("tokenizer") else base
        assert [(run_dir / what / name).exists() for what in ("model", "adapter")] == [True, len(kept) == 2]
        assert all((run_dir / what / name).read_bytes() == (own / name).read_bytes() for what in kept)


def go_on(run_dir: Path, *words: object) -> str:
    """What the command says of a run whose last step and exports are lost."""
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:06d}")
    for name in ("model", "adapter"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / "DONE").unlink()
    return dpo_dist(*words, f"run.dir={run_dir}").stdout


def test_an_adapter_trained_beside_a_frozen_one_resumes_to_the_same_bits_and_at_another_number_of_ranks(
        tmp_path: Path, words: list[str], rows: object):
    start, reference = (write_adapter(tmp_path / name, tmp_path / "m", seed, modules_to_save=["lm_head"])
                        for name, seed in (("start", 1), ("reference_adapter", 2)))
    run_dir = tmp_path / "run"
    words = [*words, *SHARDED, f"model.path={start}", f"reference.path={reference}", "reference=adapter",
             "reference.mode=live", "train.save_every_steps=2"]
    dpo_dist(*words, f"run.dir={run_dir}")
    straight, logged = tensors(run_dir / "adapter"), losses(run_dir)
    assert "resumed from step-000002" in go_on(run_dir, *words)
    check_same(tensors(run_dir / "adapter"), straight, within=1e-30)
    assert "resumed from step-000002" in go_on(run_dir, *words, "cluster.procs_per_node=1")
    check_same(tensors(run_dir / "adapter"), straight)
    assert losses(run_dir) == pytest.approx(logged, rel=1e-5, abs=1e-6)
    shutil.rmtree(run_dir / "adapter")
    assert "resumed from step-000003" in dpo_dist(*words, "cluster.procs_per_node=1", f"run.dir={run_dir}").stdout
    assert "nothing to do" in dpo_dist(*words, "cluster.procs_per_node=1", f"run.dir={run_dir}").stdout


def test_fresh_adapters_of_any_kind_train_alike_when_sharded_and_are_exported_when_asked_for(
        tmp_path: Path, words: list[str], rows: list[dict[str, list[int]]]):

    words = [*[word for word in words if not word.startswith("export")], f"model.path={tmp_path / 'm'}",
             "model.lora.rank=4", "model.lora.rslora=true", "model.lora.dora=true",
             "model.lora.modules_to_save=[lm_head,layernorm]", "reference=adapter_off"]
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    dpo_dist(*words, "zero=none", f"run.dir={alone}")
    dpo_dist(*words, *SHARDED, "reference.mode=live", "export.what=adapter", f"run.dir={sharded}")
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-5, abs=1e-6) and losses(alone)[-1] < 0.5
    assert not (alone / "adapter").exists() and not (sharded / "model").exists()
    dpo_dist("export", *words[1:], "zero=none", "export.what=both", f"run.dir={alone}")
    # Adam makes whole steps of gradients near 0, whose sign rounding may decide
    check_same(tensors(alone / "adapter"), tensors(sharded / "adapter"), within=2e-4)
    written = json.loads((alone / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == (str(tmp_path / "m"), 4, 8)
    assert written["use_rslora"] and written["use_dora"] and written["lora_dropout"] == 0
    assert {name.rpartition("lora_")[2] for name in tensors(alone / "adapter") if "self_attn.q_proj" in name} == {
        "A.weight", "B.weight", "magnitude_vector"}
    check_same_logps(adapted(alone / "model", None), adapted(tmp_path / "m", alone / "adapter"), rows)
    card = (alone / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and f"base_model: {tmp_path / 'm'}" in card and "rsLoRA, DoRA rank 4" in card


def test_a_reference_adapter_for_other_weights_than_the_policys_base_is_refused(tmp_path: Path, words: list[str]):
    write_tiny_llama(tmp_path / "other", seed=1)
    start, reference = (write_adapter(tmp_path / name, tmp_path / base, 1) for name, base in
                        (("start", "m"), ("reference_adapter", "other")))
    words = [*words, "zero=none", f"model.path={start}", f"reference.path={reference}", f"run.dir={tmp_path / 'run'}"]
    assert "whose weights are others than those of the policy's base" in dpo_dist(*words, "reference=adapter",
                                                                                  code=2).stderr
    shutil.rmtree(tmp_path / "other")
    assert "an adapter for" in (shown := dpo_dist(*words, code=2).stderr) and "base_model_name_or_path" in shown


def test_a_reference_adapter_has_one_key_and_the_values_of_the_oracle_in_every_engine_that_computes_it(
        tmp_path: Path, words: list[str], rows: list[dict[str, list[int]]]):
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey

    kinds = list(KINDS.values())
    start, reference = (write_adapter(tmp_path / name, tmp_path / "m", seed, **kinds[seed]) for name, seed in
                        (("start", 1), ("reference_adapter", 2)))
    words = ["score", *words[1:], f"model.path={start}", f"reference.path={reference}", f"run.dir={tmp_path / 'score'}"]
    found = {}
    for engine, more in {"hf": ["zero=none"], "zero": SHARDED, "adapter": SHARDED}.items():
        cache = tmp_path / f"cache_of_{engine}"
        shown = dpo_dist(*words, *more, f"reference={engine}", f"reference.cache_dir={cache}").stdout
        assert shown.strip().endswith(f"scored {2 * ROWS}, cached 0"), engine
        (key,) = (ReferenceKey(**json.loads(file.read_text())) for file in cache.rglob("key.json"))
        values = LogpCache(str(cache), key)
        values.open_shards(values.verified_shards()[0])
        found[engine] = (key, [values.logps(row["prompt_ids"], row[name]) for row in rows
                               for name in ("chosen_ids", "rejected_ids")])
    assert found["zero"][0] == found["adapter"][0] == found["hf"][0]
    for engine in ("zero", "adapter"):
        for one, other in zip(found["hf"][1], found[engine][1], strict=True):
            assert abs(one - other).max() < 1e-5, engine
