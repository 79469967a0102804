"""DPO on one CUDA device in bf16: gpu.py [--models 0.5B,8B] [--lengths 2048,32768] [--minutes 9] [--out FILE] [--smoke].

Llama-like models of 0.5B to 8B with random weights. Every step has about 32,768 tokens unshared, or one pair where that is longer: pairs
whose prompt is half of `length`, whose chosen completion is the other half, and whose rejected one is between half and all of that.
Weights, gradients and AdamW's moments are bf16 for all, 8 bytes a parameter (training under DeepSpeed holds fp32 master weights and moments
besides); larger models than 0.5B recompute activations (gradient checkpointing). A process for each model.

dpo              this project's step: shared prompts, reference log-probs known, update included; packing is done beforehand, as in training
dpo sdpa, flex   the same with another attention (gpu_attention.py)
dpo compiled     the same with feed-forward blocks and norms under torch.compile
sft              a supervised step on both completions of each pair, packed, each with a prompt of its own; same model code, same update
naive            naive_dpo.py: padded rows, whole logits, a live reference on a copy of the weights; two rows or 16,384 tokens at once
attention *      one layer's attention of the whole pack alone, forward and backward, `differs_by` from the project's own on the same inputs

`tflops` counts the FLOPs of distinct tokens only, forward and backward and nothing recomputed; of sft and naive too (what the pairs need,
not what was done). `share_of_product` is that over the rate of a bf16 matrix product (8,192 cubed) timed right after the case, `mfu` over
the data sheet's rate. `tokens_per_second` counts the pairs' tokens with the prompt twice, whatever is computed. `first_loss` of dpo and
naive must be ln 2, as policy and reference begin alike. `peak_gib` is what torch's allocator held at most. Seconds are medians after one
step that warms up. A case that runs out of memory is a row that says so; one for which the time did not suffice is left out, and run by
the next call, which keeps the rows that the same device and torch have given already.

--smoke: tiny shapes in fp32 on any device; nothing is written unless --out is given. Results: benchmarks/results/gpu.json.
"""
from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_attention import CANDIDATES, IMPLEMENTATIONS
from naive_dpo import naive_gradients
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_dist.compose import compose
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.data.store import PairStore, prepare
from dpo_dist.metrics import MetricSums
from dpo_dist.models.attention import Forest
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.load import ScoredModel
from dpo_dist.perf import Clock, known_peak_tflops
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.preference import PackedBatch, TokenizedPair
from dpo_dist.step import step_batches, train_step
from dpo_dist.world import World

RESULTS = Path(__file__).parent / "results" / "gpu.json"
LR, UNSHARED_TOKENS, NAIVE_TOKENS = 1e-6, 32_768, 16_384
LENGTHS = (2_048, 8_192, 32_768)
CASES = ("dpo", "sft", "naive", "attention branch", "attention sdpa", "attention flex", "dpo sdpa", "dpo flex", "dpo compiled")
# hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied: Qwen2.5 0.5B and 1.5B, Llama 3.2 3B, Llama 3.1 8B
SHAPES = {"0.5B": (896, 4864, 24, 14, 2, 151_936, True), "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
          "3B": (3072, 8192, 28, 24, 8, 128_256, True), "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
          "smoke": (64, 128, 2, 4, 2, 512, False)}


def main(models: list[str], lengths: list[int], minutes: float, out: Path | None) -> int:
    """Runs each model's cases in a process of its own and writes the table after every case; 1 where a case failed."""
    header = {"device": device_name(), "torch": torch.__version__}
    known = json.loads(out.read_text()) if out is not None and out.exists() else {}
    rows = known.get("rows", []) if {k: known.get(k) for k in header} == header else []
    rows = [row for row in rows if "failed" not in row]
    deadline = time.monotonic() + 60 * minutes
    for i, model in enumerate(models):
        seconds = (deadline - time.monotonic()) / (len(models) - i)
        done = [case_name(row) for row in rows]
        todo = [f"{length}/{what}" for what in CASES for length in lengths if f"{model}/{length}/{what}" not in done]
        words = [sys.executable, __file__, "--worker", model, "--todo", *todo, "--minutes", str(seconds / 60)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as worker:
            killer = threading.Timer(seconds + 45, worker.kill)
            killer.start()
            for line in worker.stdout or ():
                rows.append(json.loads(line))
                print(line.strip(), flush=True)
                if out is not None:
                    out.write_text(json.dumps({**header, "ratios": ratios(rows), "rows": rows}, indent=1) + "\n")
            killer.cancel()
        if worker.returncode:
            print(f"{model}: the process ended with {worker.returncode}, -9 where its time was over; its other cases are left out", flush=True)
    print(json.dumps(ratios(rows), indent=2))
    missing = len(models) * len(lengths) * len(CASES) - len({case_name(row) for row in rows})
    if missing > 0:
        print(f"{missing} cases were not reached in {minutes} minutes; the same command runs them")
    return int(any("failed" in row for row in rows))


def case_name(row: dict[str, Any]) -> str:
    return f"{row['model']}/{row['length']}/{row['case']}"


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By model and length: seconds of dpo over sft, and of each other case over the project's own."""
    seconds = {case_name(row): row["seconds"] for row in rows if "seconds" in row}
    found: dict[str, dict[str, float]] = {}
    for name, value in seconds.items():
        where, case = name.rsplit("/", 1)
        own = seconds.get(f"{where}/{'attention branch' if case.startswith('attention') else 'dpo'}")
        if own and case not in ("dpo", "attention branch"):
            label, ratio = ("dpo / sft", own / value) if case == "sft" else (f"{case} / ours", value / own)
            found.setdefault(where, {})[label] = round(ratio, 3)
    return found


# -------------------------------------------------------------------------------------------------------------- one model's cases


def work(model: str, todo: list[str], minutes: float) -> None:
    """Prints a line of JSON for each case that is begun in time."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, Path(folder))
        for length, what in (each.split("/") for each in todo):
            if time.monotonic() - began > 60 * minutes:
                return
            print(json.dumps({"model": model, "length": int(length), "case": what, **bench.run(int(length), what)}), flush=True)


class Bench:
    """A model, its optimizer, and pairs of each length."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.world = World.start(compose([f"model.path={folder}", f"cluster.device={'cuda' if torch.cuda.is_available() else 'cpu'}"]).cluster)
        self.device = self.world.device
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu and name != "smoke" else torch.float32
        hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
        self.config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                                  num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=65_536,
                                  tie_word_embeddings=tied, pad_token_id=0, bos_token_id=2, eos_token_id=1)
        self.flops = forward_flops(self.config).training(frozen_base=False)
        torch.manual_seed(0)
        with torch.device(self.device):
            lm = LlamaForCausalLM._from_config(self.config, dtype=self.dtype, attn_implementation="branch")
        self.recomputes = name not in ("0.5B", "smoke")
        if self.recomputes:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optim = compose([f"model.path={folder}"]).optim
        self.policy = SinglePolicy(ScoredModel(lm, "branch"), optim, self.device)
        self.parameters = sum(p.numel() for p in lm.parameters())

    def run(self, length: int, what: str) -> dict[str, Any]:
        if "flex" in what and not self.on_gpu:
            return {"not_run": "flex_attention has no backward on a CPU"}
        if "compiled" in what and not self.on_gpu:
            return {"not_run": "compiled on GPUs only"}
        try:
            found = self._measure(length, what)
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        except Exception as problem:                 # one case that fails says so and leaves the others their turn
            found = {"failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
        self.policy.model.zero_grad()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        return found

    def _measure(self, length: int, what: str) -> dict[str, Any]:
        pairs = self._pairs(length)
        rows = [pairs[i] for i in range(len(pairs))]
        step, work = self._case(what, pairs, rows, self.flops)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        value = step()                                # warms up, and compiles what is compiled
        seconds = []
        while len(seconds) < 2 or (sum(seconds) < 3 and len(seconds) < 10):
            began = self._now()
            step()
            seconds.append(self._now() - began)
        median = statistics.median(seconds)
        tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in rows)
        rate, sheet = self._product_rate(), known_peak_tflops(self.device, self.dtype)
        found = {"seconds": round(median, 5), "spread": round((max(seconds) - min(seconds)) / median, 3), "pairs": len(rows),
                 "tokens_per_second": round(tokens / median), "tflops": round(work / median / 1e12, 3),
                 "product_tflops": round(rate / 1e12, 2), "share_of_product": round(work / median / rate, 4),
                 "mfu": round(work / median / (sheet * 1e12), 4) if sheet else None,
                 "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.on_gpu else None,
                 "parameters": self.parameters, "recomputes_activations": self.recomputes and not what.startswith("attention")}
        return {**found, ("differs_by" if what.startswith("attention") else "first_loss"): value}

    def _case(self, what: str, pairs: PairStore, rows: list[TokenizedPair], flops: Any) -> tuple[Callable[[], float], float]:
        """(what a measurement repeats, the FLOPs of distinct tokens that it needs)."""
        loss = compose([f"model.path={self.folder}"]).loss
        budget = max(UNSHARED_TOKENS, 2 * max(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in rows))
        batches = step_batches(pairs, np.arange(len(rows)), loss, self.world, budget, flops)
        assert len(batches.batches) == 1, "the whole step is one pack"
        kind, _, variant = what.partition(" ")
        if kind == "attention":
            return self._attention(variant, batches.batches[0]), self._attention_flops(rows)
        if kind == "sft":
            packs = [pack_sequences([Sequences(p.prompt_ids, (c,)) for c in (p.chosen_ids, p.rejected_ids)]) for p in rows]
            return lambda: self._sft(packs), batches.work.flops
        if kind == "naive":
            return self._naive(rows, loss.beta), batches.work.flops

        self._use("branch")
        with self.policy.evaluating():
            reference = Known([self.policy.token_logps(batch).logps for batch in batches.batches], batches.batches)

        def dpo() -> float:
            self._use(IMPLEMENTATIONS.get(variant, "branch"), compiled=variant == "compiled")
            sums = MetricSums(loss, self.device)
            total = train_step(self.policy, reference, batches, loss, sums, self.world, Clock(self.world))
            self.policy.step(LR)
            return total.item()

        return dpo, batches.work.flops

    def _sft(self, packs: list[PackedBatch]) -> float:
        self._use("branch")
        tokens, total = sum(len(p.targets) for p in packs), 0.0
        for i, pack in enumerate(packs):
            loss = -self.policy.token_logps(pack).logps.sum() / tokens
            self.policy.backward(loss, is_last=i + 1 == len(packs))
            total += loss.detach()
        self.policy.step(LR)
        return float(total)

    def _naive(self, rows: list[TokenizedPair], beta: float | None) -> Callable[[], float]:
        assert beta is not None
        self._use("sdpa")
        model = self.policy.model.causal
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in rows)
        at_once = max(1, NAIVE_TOKENS // (2 * longest))

        def step() -> float:
            self._use("sdpa")
            loss = naive_gradients(model, reference, rows, at_once, beta, self.device)
            self.policy.step(LR)
            return loss

        return step

    def _attention(self, variant: str, batch: PackedBatch) -> Callable[[], float]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        width = self.config.hidden_size // heads
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(1, batch.n_tokens, n, width, device=self.device, dtype=self.dtype).transpose(1, 2)
                         for n in (heads, kv_heads, kv_heads, heads))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        with torch.no_grad():
            own = CANDIDATES["branch"](self.policy.model, *inputs, None, forest=Forest(batch.trees))[0]

        def layer() -> float:
            out = CANDIDATES[variant](self.policy.model, *inputs, None, forest=Forest(batch.trees))[0]
            torch.autograd.grad(out, inputs, grad.transpose(1, 2))
            return float((out.detach() - own).abs().max())

        return layer

    def _attention_flops(self, rows: list[TokenizedPair]) -> float:
        lengths = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in rows])
        attention = tuple((each / self.config.num_hidden_layers, window) for each, window in self.flops.attention)
        prompts, completions = type(self.flops)(0.0, 0.0, attention).of_pairs(lengths)
        return float(prompts.sum() + completions.sum())

    def _use(self, attention: str, compiled: bool = False) -> None:
        self.policy.model.causal.config._attn_implementation = attention
        for module in self.policy.model.modules():
            if type(module).__name__.endswith(("MLP", "RMSNorm")):
                if compiled and module._compiled_call_impl is None:
                    module.compile(dynamic=True)
                elif not compiled:
                    module._compiled_call_impl = None

    def _pairs(self, length: int) -> PairStore:
        path, r = self.folder / f"{length}.jsonl", random.Random(length)
        if not path.exists():
            with path.open("w") as f:
                for _ in range(max(1, (UNSHARED_TOKENS if self.name != "smoke" else 512) // (2 * length))):
                    half = length // 2
                    lengths = {"prompt_ids": half, "chosen_ids": half, "rejected_ids": r.randint(half // 2, half)}
                    f.write(json.dumps({k: [r.randrange(4, self.config.vocab_size) for _ in range(n)] for k, n in lengths.items()}) + "\n")
        config = compose([f"model.path={self.folder}", f"data.train=[{{path: {path}, format: token_ids}}]", "data.max_length=65536",
                          f"data.cache_dir={self.folder / 'tokens'}"])
        return prepare(config.data, None, None)[0]

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _product_rate(self) -> float:
        """FLOPs a second of a matrix product in the model's dtype, now."""
        n, repeats = (8192, 20) if self.on_gpu else (512, 5)
        a, b = (torch.ones(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        a @ b
        began = self._now()
        for _ in range(repeats):
            a @ b
        return repeats * 2 * n**3 / (self._now() - began)


class Known:
    """A reference whose log-probs are known already, as those of the cache are: here those that the policy began with."""

    def __init__(self, logps: Sequence[torch.Tensor], batches: Sequence[PackedBatch]):
        self._logps = {batch.pair_ids: values.cpu() for values, batch in zip(logps, batches, strict=True)}

    def token_logps(self, batch: PackedBatch) -> torch.Tensor:
        return self._logps[batch.pair_ids]

    def close(self) -> None:
        """Nothing is held."""


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", default="0.5B,1.5B,3B,8B")
    words.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    words.add_argument("--minutes", type=float, default=9.0)
    words.add_argument("--out", type=Path)
    words.add_argument("--smoke", action="store_true")
    words.add_argument("--worker", help=argparse.SUPPRESS)
    words.add_argument("--todo", nargs="*", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        work(given.worker, given.todo, given.minutes)
    elif given.smoke:
        sys.exit(main(["smoke"], [64, 128], given.minutes, given.out))
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device here; --smoke runs tiny shapes on the CPU")
    else:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        sys.exit(main(given.models.split(","), [int(n) for n in given.lengths.split(",")], given.minutes, given.out or RESULTS))
