"""The engine against a real vLLM, started by the run itself. `make test-vllm` sets its environment up; skipped where
there is none."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, dpo_dist, train_on, write_rows, write_tiny_llama

PYTHON = Path(os.environ.get("DPO_DIST_VLLM_PYTHON", REPO / ".venv-vllm" / "bin" / "python"))
pytestmark = [pytest.mark.slow, pytest.mark.distributed,
              pytest.mark.skipif(not PYTHON.exists(), reason=f"needs a vLLM environment ({PYTHON} is not there; run "
                                                             "make test-vllm)")]

# vLLM wants heads of 32 or more. Weights of 0.05: with 0.2, transformers' own fp32 forward is up to 8e-5 a token from
# its fp64 one.
SHAPE = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 512,
         "initializer_range": 0.05}


def write_qwen2(folder: Path) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("write", [lambda folder: write_tiny_llama(folder, **SHAPE), write_qwen2],
                         ids=["llama", "qwen2"])
@pytest.mark.parametrize("processes", [1, 2])
def test_vllm_agrees_with_the_plain_forward_in_fp32(tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch,
                                                    write, processes: int):
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_dist.logps import plain_token_logps
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    write(tmp_path / "m")
    rows = write_rows(tmp_path / "rows.jsonl", 60, vocabulary=128, longest=100)
    words = [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), f"run.dir={tmp_path / 'run'}",
             "reference=vllm", "cluster.timeout_seconds=600", "reference.requests.wait_seconds=300",
             f"cluster.procs_per_node={processes}"]
    out = dpo_dist("score", *words, f"reference.server={PYTHON}", timeout=600).stdout
    assert out.strip().endswith("scored 120, cached 0")
    (folder,) = (tmp_path / "reference").iterdir()
    cache = LogpCache(str(tmp_path / "reference"), ReferenceKey(**json.loads((folder / "key.json").read_text())))
    cache.open_shards(cache.verified_shards()[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    errors = []
    for row in rows:
        for completion in (row["chosen_ids"], row["rejected_ids"]):
            with torch.no_grad():
                wanted = plain_token_logps(model, torch.tensor(row["prompt_ids"]), torch.tensor(completion)).numpy()
            errors.append(np.abs(cache.logps(row["prompt_ids"], completion) - wanted))
    print(f"a token: mean {np.concatenate(errors).mean():.2e}, worst {np.concatenate(errors).max():.2e}; parity.json: "
          f"{(tmp_path / 'run' / 'parity.json').read_text()}")
    assert np.concatenate(errors).max() < 5e-5
