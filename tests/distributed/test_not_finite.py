"""A step whose loss or gradient is not finite leaves what reproduces it: its pairs, which of them it was, and where to
start."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from conftest import dpo_dist, eval_on, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

RARE = 63                                               # a token whose embedding is not a number


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_a_pair_that_is_not_finite_is_named_and_left_with_what_reproduces_it(tmp_path: Path, base: list[str],
                                                                             loss: str):
    folder = write_tiny_llama(tmp_path / "m")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][RARE] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl", 32, vocabulary=RARE)
    rows[17]["chosen_ids"].insert(0, RARE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    words = [f"model.path={folder}", *base, "cluster.procs_per_node=2", "zero=zero2", "train.pairs_per_step=4"]
    wrong = dpo_dist("train", *words, train_on(tmp_path / "rows.jsonl"), f"loss={loss}", f"run.dir={run}",
                     "train.save_every_steps=1", "train.seed=3", *live(loss), code=1).stderr

    (left,) = (run / "not-finite").iterdir()
    found: dict[str, Any] = json.loads((left / "step.json").read_text())
    pairs = [json.loads(line) for line in (left / "pairs.jsonl").read_text().splitlines()]
    step = found["step"]
    assert left.name == f"step-{step:06d}" and str(left) in wrong and "rows.jsonl:18" in wrong
    assert found["what"] == "loss" and len(found["pairs"]) == len(pairs) == 4
    assert [one["where"].rpartition(":")[2] for one in found["pairs_not_finite"]] == ["18"]
    assert found["ranks"] == 2 and "torch" in found["versions"] and found["config"]["loss"]["name"] == loss
    assert found["state"]["checkpoint"] == (f"step-{step - 1:06d}" if step > 1 else None)
    (bad,) = [pair for pair in pairs if pair["pair"] == found["pairs_not_finite"][0]["pair"]]
    assert bad["chosen_ids"] == rows[17]["chosen_ids"] and bad["reward_chosen"] == "nan"
    if loss == "simpo":                                 # the rows alone show it again
        again = dpo_dist("eval", *words, "data.train=[]", eval_on(left / "pairs.jsonl"), f"loss={loss}",
                         f"run.dir={tmp_path / 'again'}").stdout
        assert "nan" in again


def live(loss: str) -> list[str]:
    """A reference of other weights, so that step 0 compares nothing; the cache would refuse what is not finite."""
    return [] if loss == "simpo" else ["reference.mode=live"]


@pytest.mark.parametrize("zero", ["zero=none", "zero=zero3"])
def test_a_gradient_that_is_not_finite_is_told_though_the_loss_is(tmp_path: Path, base: list[str], zero: str):
    """Embeddings so small that what the first norm makes of them has a slope whose square no float32 holds."""
    folder = write_tiny_llama(tmp_path / "m", rms_norm_eps=1e-44)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1e-21 / weights["model.embed_tokens.weight"].abs().mean()
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_rows(tmp_path / "rows.jsonl", 32)
    wrong = dpo_dist("train", f"model.path={folder}", *base, zero, train_on(tmp_path / "rows.jsonl"),
                     "train.pairs_per_step=4", f"run.dir={tmp_path / 'run'}", code=1).stderr
    found = json.loads((tmp_path / "run" / "not-finite" / "step-000001" / "step.json").read_text())
    assert found["what"] == "gradient" and len(found["pairs"]) == 4 and found["pairs_not_finite"] == []
    assert "gradient" in wrong and "step-000001" in wrong and "Traceback" not in wrong
