"""What a card and its libraries do, piece by piece: one process a part, started by gpu.py. Errors are relative norms
against fp64.

machine       versions, and which functions this torch has
rates         matrix products on random data (data of one value runs faster than real data), and copies: the ceilings
for all else
golden        the 58 golden loss cases with their gradients, in fp32 and in bf16, through packs, branch attention and
head of the project
attention     branch attention forward and backward, against each branch by itself in fp64
head          log-probs of 14,336 tokens, forward and backward, by block width
elementwise   norm, rotary embedding, SwiGLU: the models' own code against one kernel each
profile       one training step under the profiler: where its time goes; and scoring beside training
"""
from __future__ import annotations

import importlib.util
import inspect
import itertools
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_part import arguments, is_wanted, rounded, tell
from gpu_shapes import (
    SHAPES,
    config_of,
    device,
    median_seconds,
    on_gpu,
    relative_error,
    synchronize,
    write_model,
    write_rows,
)
from torch import Tensor

from dpo_dist.types import Span, Tree

REPO = Path(__file__).resolve().parent.parent
SMOKE = "--smoke" in sys.argv


def probe_dtype() -> torch.dtype:
    return torch.bfloat16


# ------------------------------------------------------------------------------------------------------- machine, rates


def machine(wanted: Callable[[str], bool]) -> None:
    from torch.nn.attention import varlen

    def has(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            return False

    def overloads(name: str) -> bool:
        return "dtype_out" in getattr(torch.ops.aten, name).overloads()

    import deepspeed
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "deepspeed": deepspeed.__version__, "triton": has("triton"),
        "liger": has("liger_kernel"), "compiler": shutil.which("gcc") or "none",
        "FlashAttention 3": has("flash_attn_interface"), "FlashAttention 4": has("flash_attn.cute"),
        "mm to fp32": overloads("mm"), "addmm to fp32": overloads("addmm"),
        "varlen_attn": list(inspect.signature(varlen.varlen_attn).parameters)}
    if on_gpu():
        shown = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
                                "--format=csv,noheader"],
                               capture_output=True, text=True).stdout.strip()
        from dpo_dist.runtime.process_defaults import set_defaults

        set_defaults()
        torch.ones(2**28, device="cuda")
        segments = torch.cuda.memory_snapshot()
        found |= {"driver, clock, highest clock, power": shown, "capability": torch.cuda.get_device_capability(),
                  "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
                  "expandable segments": any(segment.get("is_expandable") for segment in segments)}
    tell("versions", **found)


def rates(wanted: Callable[[str], bool]) -> None:
    """Products as the models have them: tokens by (hidden, feed-forward), and a cube."""
    tokens = 256 if SMOKE else 16_384
    shapes = {"cube": (256,) * 3 if SMOKE else (8192,) * 3}
    shapes |= {f"{model} up": (tokens, SHAPES[model][0], SHAPES[model][1])
               for model in (["tiny"] if SMOKE else ["0.5B", "3B", "8B"])}
    for (name, (m, k, n)), dtype in itertools.product(shapes.items(), (torch.bfloat16, torch.float32)):
        if not wanted(case := f"{name} {str(dtype).removeprefix('torch.')}"):
            continue
        a, b = torch.randn(m, k, device=device()).to(dtype), torch.randn(k, n, device=device()).to(dtype)
        out = torch.empty(m, n, device=device(), dtype=dtype)
        seconds = median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), repeats=20)
        tell(case, tflops=round(2 * m * k * n / seconds / 1e12, 2))
    if wanted("copy"):
        data = torch.randn(2**20 if SMOKE else 2**30, device=device())
        target = torch.empty_like(data)
        seconds = median_seconds(lambda: target.copy_(data), repeats=20)
        tell("copy", terabytes_a_second=round(2 * data.nbytes / seconds / 1e12, 3))


# --------------------------------------------------------------------------------------------------------------- golden


def golden(wanted: Callable[[str], bool]) -> None:
    """Losses and gradient norms of all cases against the golden fp32 values, which TRL 1.16 gave."""
    sys.path += [str(REPO / "tests" / "golden"), str(REPO / "tests")]
    import test_golden_losses as held

    from dpo_dist.data.pack import pack_pairs
    from dpo_dist.logps import pair_logps
    from dpo_dist.losses import preference_loss
    from dpo_dist.models.load import ScoredModel, load_causal_lm, token_logps
    from dpo_dist.types import TokenizedPair

    torch.backends.cuda.matmul.allow_tf32 = False
    pairs = [TokenizedPair(tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), tuple(r["rejected_ids"]), "")
             for r in held.ROWS]
    batch = pack_pairs(pairs, range(len(pairs)), [1.0] * len(pairs), share_completions=False).to(device())
    chosen_tokens = sum(len(p.chosen_ids) for p in pairs) / len(pairs)
    for dtype in (torch.float32, torch.bfloat16):
        if not wanted(name := str(dtype).removeprefix("torch.")):
            continue
        policy, reference = (ScoredModel(load_causal_lm(held.HERE / which, dtype, "branch"), "branch").to(device())
                             for which in ("policy", "ref"))
        with torch.no_grad():
            reference_logps = token_logps(reference, batch).logps
        worst: Counter[str] = Counter()
        for case in held.CASES:
            expected = held.GOLDEN["float32"]["cases"][case]
            loss = held.loss_config(case, expected["args"])
            tokens = token_logps(policy, batch, collision=bool(loss.wpo))
            values = pair_logps(batch, tokens, reference_logps if loss.needs_reference else None, loss, chosen_tokens)
            value = preference_loss(values, loss).mean()
            gradients = torch.autograd.grad(value, list(policy.parameters()))
            norm = torch.stack([g.double().norm() for g in gradients]).norm().item()
            worst["loss"] = max(worst["loss"], abs(value.item() / expected["loss"] - 1))
            worst["grad_norm"] = max(worst["grad_norm"], abs(norm / expected["grad_norm"] - 1))
        logps = held.GOLDEN["float32"]["logps"]["policy"]
        wanted_tokens = torch.tensor([t for pair in zip(logps["chosen_tok"], logps["rejected_tok"], strict=True)
                                      for row in pair for t in row])
        token_error = (token_logps(policy, batch).logps.detach().cpu() - wanted_tokens).abs()
        tell(name, cases=len(held.CASES), **rounded({
            "worst_loss": worst["loss"], "worst_grad_norm": worst["grad_norm"],
            "worst_token_nats": token_error.max().item(), "mean_token_nats": token_error.mean().item()}))


# ------------------------------------------------------------------------------------------------------------ attention


def attention(wanted: Callable[[str], bool]) -> None:
    from dpo_dist.models.attention import Forest, branch_attention
    from dpo_dist.models.varlen import choose_kernel

    heads_of = {"14/2 of 64": (14, 2, 64), "32/8 of 128": (32, 8, 128)}
    lengths = {"1k": (512, 512, 512, 16), "4k": (2048, 2048, 2048, 4), "16k": (8192, 8192, 8192, 1),
               "tenth": (400, 3600, 3600, 2),
               "short branches": (2048, 64, 64, 8)}           # prompt, two completions, trees
    if SMOKE:
        heads_of, lengths = {"4/2 of 16": (4, 2, 16)}, {"1k": (16, 16, 12, 2), "short branches": (33, 1, 2, 2)}
    for (kind, (heads, key_heads, size)), (name, (prompt, left, right, trees)), window in itertools.product(
            heads_of.items(), lengths.items(), (None, 6 if SMOKE else 1000)):
        case = f"{kind} {name}" + ("" if window is None else " window")
        if not wanted(case) or (window is not None and name != "1k"):
            continue
        forest = Forest([tree_at(i * (prompt + left + right), prompt, left, right) for i in range(trees)])
        tokens = trees * (prompt + left + right)
        made = torch.Generator(device=device()).manual_seed(0)
        q, k, v, grad = (torch.randn(1, n, tokens, size, device=device(),
                                     generator=made).to(probe_dtype()).requires_grad_()
                         for n in (heads, key_heads, key_heads, heads))

        def forward(q=q, k=k, v=v, forest=forest, window=window) -> Tensor:
            return branch_attention(torch.nn.Identity(), q, k, v, None, forest=forest, sliding_window=window)[0]

        def both(forward=forward, q=q, k=k, v=v, grad=grad) -> tuple[Tensor, ...]:
            out = forward()
            return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach().transpose(1, 2)))

        errors = {}
        if trees * (prompt + left) ** 2 * heads * 8 < 6e9 or SMOKE:          # fp64 scores that fit
            exact = by_branch(q, k, v, grad, forest, window)
            errors = rounded({f"error_{n}": relative_error(a, b)
                              for n, a, b in zip(("o", "dq", "dk", "dv"), both(), exact, strict=True)}, 3)
        with torch.no_grad():
            ahead = median_seconds(forward)
        whole = median_seconds(both)
        flops = 4.0 * heads * size * keys_seen(forest, window)
        tell(case, kernel=str(choose_kernel(device(), probe_dtype(), heads, key_heads, size)), tokens=tokens, **errors,
             forward_ms=round(1000 * ahead, 3), backward_ms=round(1000 * (whole - ahead), 3),
             forward_tflops=round(flops / ahead / 1e12, 1),
             backward_tflops=round(2.5 * flops / max(whole - ahead, 1e-9) / 1e12, 1))


def tree_at(at: int, prompt: int, left: int, right: int) -> Tree:
    middle = at + prompt
    return Tree(Span(at, middle), (Span(middle, middle + left), Span(middle + left, middle + left + right)))


def keys_seen(forest: Any, window: int | None) -> float:
    total = 0.0
    for queries, keys in zip(forest.lengths, forest.seen, strict=True):
        seen = torch.arange(keys - queries + 1, keys + 1, dtype=torch.float64)
        total += float((seen if window is None else seen.clamp(max=window)).sum())
    return total


def by_branch(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, forest: Any, window: int | None) -> tuple[Tensor, ...]:
    """(o, dq, dk, dv) in fp64: every prompt and branch by itself, written out, on the same device."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = []
    for queries, keys, values in zip(q.split(forest.lengths, 2), forest.keys_of_each(k, 2), forest.keys_of_each(v, 2),
                                     strict=True):
        keys, values = (torch.cat(x, 2).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        last = keys.shape[2]
        back = torch.arange(
            last - queries.shape[2], last, device=q.device)[:, None] - torch.arange(last, device=q.device)
        seen = (back >= 0) & ((back < window) if window is not None else True)
        scores = (queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        out.append(scores.softmax(-1) @ values)
    whole = torch.cat(out, 2).transpose(1, 2)
    return (whole.detach(), *torch.autograd.grad(whole, (q, k, v), grad.detach().double().transpose(1, 2)))


# ----------------------------------------------------------------------------------------------------------------- head


def head(wanted: Callable[[str], bool]) -> None:
    from dpo_dist.models.head import BlockwiseLogps, kernels_misfit, passes_for
    from dpo_dist.sizing.logit_blocks import Blocks, plan_blocks

    rows = 64 if SMOKE else 14_336
    for hidden_size, vocabulary in ((64, 512),) if SMOKE else ((896, 151_936), (4096, 128_256), (4096, 151_936)):
        torch.manual_seed(0)
        hidden = torch.randn(rows, hidden_size, device=device()).to(probe_dtype()).requires_grad_()
        weight = (torch.randn(vocabulary, hidden_size, device=device())
                  * hidden_size**-0.5).to(probe_dtype()).requires_grad_()
        targets, upstream = torch.randint(vocabulary, (rows,), device=device()), torch.randn(rows, device=device())
        own = plan_blocks(rows, vocabulary, 2, "cuda" if on_gpu() else "cpu")
        plans = {
            "as chosen": own, "1170 wide": Blocks(vocabulary, 1170, 1), "8192 wide": Blocks(vocabulary, 8192, 1),
            "32768 wide": Blocks(vocabulary, 32_768, 1), "kept whole": Blocks(vocabulary, own.width, len(own.spans))}
        for name, blocks in plans.items():
            if not wanted(case := f"{hidden_size} x {vocabulary} {name}"):
                continue

            def forward(blocks=blocks, hidden=hidden, weight=weight, targets=targets, keep=True) -> Tensor:
                return BlockwiseLogps.apply(hidden, weight, None, targets, 1.0, None, False, keep, blocks,
                                            passes_for(hidden))[0]

            def both(forward=forward, hidden=hidden, weight=weight, upstream=upstream) -> tuple[Tensor, ...]:
                values = forward()
                return (values.detach(), *torch.autograd.grad(values, (hidden, weight), upstream))

            found = both()
            errors = head_errors(found, hidden, weight, targets, upstream)
            if on_gpu():
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            with torch.no_grad():
                ahead = median_seconds(lambda forward=forward: forward(keep=False))
            whole = median_seconds(both)
            flops = 2.0 * rows * hidden_size * vocabulary
            tell(case, width=blocks.width, kept=blocks.kept,
                 kernels=(kernels_misfit(device()) or "Triton's") if on_gpu() else "none", **errors,
                 forward_ms=round(1000 * ahead, 2), both_ms=round(1000 * whole, 2),
                 forward_tflops=round(flops / ahead / 1e12, 1), both_tflops=round(3 * flops / whole / 1e12, 1),
                 peak_gib=round((torch.cuda.max_memory_allocated() - held) / 2**30, 2) if on_gpu() else None)


def head_errors(found: tuple[Tensor, ...], hidden: Tensor, weight: Tensor, targets: Tensor,
                upstream: Tensor) -> dict[str, float]:
    """Of the log-probs and the hidden gradients of a few rows, against fp64."""
    few = slice(0, 32)
    h, w = hidden.detach()[few].double().requires_grad_(), weight.detach().double()
    values = (h @ w.t()).log_softmax(-1).gather(1, targets[few, None])[:, 0]
    exact = torch.autograd.grad(values, h, upstream[few].double())[0]
    return rounded({"worst_nats": (found[0][few].double() - values.detach()).abs().max().item(),
                    "error_hidden_gradient": relative_error(found[1][few], exact)}, 3)


# ---------------------------------------------------------------------------------------------------------- elementwise


# eager, one kernel, inputs, bytes that must move at least
Way = tuple[Callable[[], Any], Callable[[], Any], list[Tensor], float]


def elementwise(wanted: Callable[[str], bool]) -> None:
    """Forward and backward, in GB/s of what has to be read and written at least."""
    for model in ("tiny",) if SMOKE else ("0.5B", "8B"):
        for name, (eager, one_kernel, inputs, least) in elementwise_ways(model).items():
            if not wanted(case := f"{model} {name}"):
                continue
            found, results = {}, []
            for label, work in (("eager", eager), ("fused", one_kernel)):
                def both(work: Callable[[], Any] = work, inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
                    out = work()
                    outs = out if isinstance(out, tuple) else (out,)
                    return (*outs, *torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs]))

                seconds = median_seconds(both)
                results.append([one.detach() for one in both()])
                found |= {f"{label}_ms": round(1000 * seconds, 3), f"{label}_gb_a_second": round(least / seconds / 1e9)}
            errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
            tell(case, **found, largest_difference=float(f"{max(errors):.3g}"))


def elementwise_ways(model: str) -> dict[str, Way]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    from dpo_dist.models.fused import Norm, Rotary, SwiGLU, gpu_kernels

    if on_gpu():
        kernels = gpu_kernels()
    else:
        sys.path += [str(REPO / "tests")]
        from plain_kernels import PLAIN as kernels
    hidden, inner, _, heads, key_heads, *_ = SHAPES[model]
    size, tokens = hidden // heads, 64 if SMOKE else 16_384

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device()).to(probe_dtype()).requires_grad_()

    norm = LlamaRMSNorm(hidden).to(device(), probe_dtype())
    x, gate, up = made(1, tokens, hidden), made(1, tokens, inner), made(1, tokens, inner)
    q, k = (made(1, tokens, n, size).transpose(1, 2).detach().requires_grad_() for n in (heads, key_heads))
    cos, sin = (made(1, tokens, size).detach() for _ in range(2))
    return {"norm": (lambda: norm(x), lambda: Norm.apply(x, norm.weight, norm.variance_epsilon, kernels),
                     [x, norm.weight], 5.0 * x.nbytes),
            "swiglu": (lambda: torch.nn.functional.silu(gate) * up, lambda: SwiGLU.apply(gate, up, kernels), [gate, up],
                       8.0 * gate.nbytes),
            "rotary": (lambda: apply_rotary_pos_emb(q, k, cos, sin),
                       lambda: tuple(Rotary.apply(one, cos, sin, kernels) for one in (q, k)), [q, k],
                       4.0 * (q.nbytes + k.nbytes))}


# -------------------------------------------------------------------------------------------------------------- profile

KINDS = {"communication": ("nccl",), "attention": ("flash", "fmha", "attention"), "head": ("_absorb", "_differentiate"),
         "products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitk", "mm_"),
         "optimizer": ("adam", "multi_tensor", "lpnorm"),
         # the rest is elementwise
         "copies": ("memcpy", "memset", "copy_kernel", "catarray", "index", "gather", "scatter")}
SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile(wanted: Callable[[str], bool]) -> None:
    for model, stage in (("tiny", "2"),) if SMOKE else (("0.5B", "2"), ("3B", "2"), ("0.5B", "null")):
        if wanted(f"{model} zero.stage={stage}"):
            with tempfile.TemporaryDirectory() as folder:
                profile_step(model, stage, Path(folder))


def profile_step(model: str, stage: str, folder: Path) -> None:
    import numpy as np
    from torch.profiler import ProfilerActivity

    from dpo_dist.config.compose import compose
    from dpo_dist.data.prepare import prepare
    from dpo_dist.models.cost import forward_flops
    from dpo_dist.models.fused import choose_kernels
    from dpo_dist.models.resolve import ModelFolder
    from dpo_dist.policy.make import make_policy
    from dpo_dist.reference.cache.fill import fill, plan_fill
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
    from dpo_dist.reference.cached import CachedReference
    from dpo_dist.reference.hf import HfReference
    from dpo_dist.run.metrics import MetricSums
    from dpo_dist.run.perf import Clock
    from dpo_dist.runtime.world import World
    from dpo_dist.step import step_batches, train_step

    length, pairs = (48, 4) if SMOKE else (2048, 16)
    write_model(model, folder / "model")
    write_rows(folder / "rows.jsonl", model, pairs, length, 0.5)
    config = compose([f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}",
                      f"data.cache_dir={folder / 'tokens'}", "data.max_length=4096", f"zero.stage={stage}",
                      "model.gradient_checkpointing=false", f"train.tokens_per_microbatch={8 * length}",
                      "cluster.device=" + ("cuda" if on_gpu() else "cpu")])
    world = World.start(config.cluster)
    data = prepare(config.data, None, None)[0]
    flops = forward_flops(config_of(model)).training(frozen_base=False)
    budget = config.train.tokens_per_microbatch
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    fused, why_not = choose_kernels(config.model.kernels, config_of(model), dtype, world.device)
    cache = LogpCache(str(folder / "reference"), ReferenceKey("bench", str(dtype)))
    folder_of_model = ModelFolder(folder / "model")
    engine = HfReference(folder_of_model, dtype, "branch", world.device, fused=fused)
    # warms up
    engine.token_logps(step_batches(data, np.arange(2), config.loss, world, budget, flops).batches[0])
    synchronize()
    scoring = median_of_one(lambda: fill(plan_fill(cache, [data], world, budget)[0], cache, [data], engine, world))
    engine.close()
    policy, reference = make_policy(config, folder_of_model, "branch", world, fused), CachedReference(cache)
    batches = step_batches(data, np.arange(pairs), config.loss, world, budget, flops, reference)

    def step() -> Tensor:
        part = (train_step(policy, reference, batches, config.loss, MetricSums(config.loss, world.device), world,
                           Clock(world)))
        policy.step(1e-6, skip=world.any_on_device(~part.isfinite()))
        return part

    loss = step().item()
    seconds = median_seconds(step, repeats=4)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        synchronize()
    by_kind, top, synchronizations = device_time(recorded)
    busy = sum(by_kind.values())
    tell(f"{model} zero.stage={stage}", kernels="fused" if fused else why_not or "eager", first_loss=loss,
         step_seconds=round(seconds, 4), tflops=round(batches.work.flops / seconds / 1e12, 1),
         micro_steps=len(batches.batches), scoring_over_training=round(scoring / seconds, 3),
         **{f"share_{kind}": round(t / seconds, 4) for kind, t in by_kind.items()},
         share_idle=round(1 - busy / seconds, 4), synchronizations=synchronizations, longest_kernels=top,
         peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu() else None)


def median_of_one(work: Callable[[], Any]) -> float:
    import time

    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def device_time(recorded: Any) -> tuple[dict[str, float], list[str], int]:
    """(seconds of kernels by kind, the longest kernels, calls that wait for the device) of a profile."""
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    waits = 0
    for event in recorded.events():
        if event.name in SYNCHRONIZING:
            waits += 1
        if str(event.device_type).endswith("CUDA"):
            seconds = event.time_range.elapsed_us() / 1e6
            name = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")
            by_kind[kind] += seconds
            by_name[event.name[:80]] += seconds
    return dict(by_kind), [f"{name}: {1000 * seconds:.2f} ms" for name, seconds in by_name.most_common(12)], waits


PARTS = {one.__name__: one for one in (machine, rates, golden, attention, head, elementwise, profile)}


if __name__ == "__main__":
    given = arguments()
    PARTS[given.part](partial(is_wanted, given))
