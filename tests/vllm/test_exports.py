"""What runs export, in a real vLLM: the model of `make real` chats, and an adapter beside its base computes what the
merged model does. `make test-vllm` sets the environment up; skipped where there is none."""
from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REAL_MODEL, dpo_dist, train_on, write_rows, write_tiny_llama
from test_real_vllm import PYTHON, SHAPE

from dpo_dist.runtime.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.distributed,
              pytest.mark.skipif(not PYTHON.exists(), reason=f"needs a vLLM environment ({PYTHON} is not there; run "
                                                             "make test-vllm)")]
SECONDS_TO_START = 300


@contextmanager
def vllm(log: Path, *words: object) -> Iterator[str]:
    """The address of an OpenAI-compatible server, started with these words."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port,
               "--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", *words]
    with log.open("w") as file:
        server = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file, env=environment)
    try:
        until = time.monotonic() + SECONDS_TO_START
        while not is_up(address):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def is_up(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def answer(address: str, path: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{address}/v1/{path}", json.dumps(question).encode(),
                                     {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())["choices"][0]


@pytest.mark.skipif(not REAL_MODEL.is_dir(), reason=f"needs the model of `make real` ({REAL_MODEL})")
def test_the_real_model_chats_as_it_does_in_transformers(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [{"role": "user", "content": "What is the capital of France?"}]
    with vllm(tmp_path / "log", "--model", REAL_MODEL, "--served-model-name", "real",
              "--max-model-len", 512) as address:
        said = answer(address, "chat/completions", {"model": "real", "messages": asked, "temperature": 0,
                                                    "max_tokens": 60})
    assert said["finish_reason"] == "stop" and "Paris" in said["message"]["content"]
    tokenizer = AutoTokenizer.from_pretrained(REAL_MODEL)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain_model = AutoModelForCausalLM.from_pretrained(REAL_MODEL, dtype="float32")
    ids = plain_model.generate(**prompt, max_new_tokens=60, do_sample=False)
    plain = tokenizer.decode(ids[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
    assert said["message"]["content"].split()[:6] == plain.split()[:6]


def test_an_adapter_beside_its_base_computes_what_the_merged_model_does(tmp_path: Path, base: list[str]):
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_dist.logps import plain_token_logps

    write_tiny_llama(tmp_path / "m", **SHAPE)
    rows = write_rows(tmp_path / "rows.jsonl", 8, vocabulary=128)
    dpo_dist("train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "model.lora.rank=8",
             "model.lora.rslora=true", "reference=adapter_off", "export.what=both", "optim.lr=1e-2",
             "train.pairs_per_step=4", f"run.dir={tmp_path / 'run'}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = [*rows[0]["prompt_ids"], *rows[0]["chosen_ids"]]
    with vllm(tmp_path / "log", "--model", tmp_path / "m", "--served-model-name", "base", "--skip-tokenizer-init",
              "--max-model-len", 256, "--enable-lora", "--max-lora-rank", 8,
              "--lora-modules", f"trained={tmp_path / 'run' / 'adapter'}") as address:
        def logps(name: str) -> torch.Tensor:
            found = answer(address, "completions", {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0,
                                                    "prompt_logprobs": 0})
            entries = zip(ids[1:], found["prompt_logprobs"][1:], strict=True)
            return torch.tensor([entry[str(token)]["logprob"] for token, entry in entries])

        served = {name: logps(name) for name in ("base", "trained")}
    with torch.no_grad():
        wanted = {name: plain_token_logps(model, torch.tensor(ids[:1]), torch.tensor(ids[1:]))
                  for name, model in (("base", plain), ("trained", merged))}
    assert (served["trained"] - served["base"]).abs().max() > 0.1, "the adapter does something"
    for name in served:
        assert (served[name] - wanted[name]).abs().max() < 1e-4, name
