"""A few steps of one run, in the processes that torchrun started; rank 0 prints a line of JSON: sizing_run.py STEPS
[overrides].

Memory is the resident set's peak minus what the process holds once everything is imported, each phase by itself: the
kernel's mark (VmHWM) is set back between them.
"""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # loaded by ZeRO at first use: baseline
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.models.checkpointing import decoder_layers
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.folder import read_config
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy.make import make_policy
from dpo_dist.policy.zero_config import deepspeed_config
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.step import step_batches, train_step
from dpo_dist.step0_checks import check_packing

PHASES = ("load", "gate", "forward", "backward", "step")         # as Clock marks them


class PhaseClock(Clock):
    """A Clock that also keeps the memory peak of each part."""

    def __init__(self, world: World):
        self.peaks = dict.fromkeys(PHASES, 0)
        super().__init__(world)

    def mark(self, part: str | None) -> None:
        super().mark(part)
        if part is not None:
            self.peaks[part] = max(self.peaks[part], peak_bytes())
        reset_peak()


def peak_bytes(what: str = "VmHWM") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def tiny_model(folder: Path, layers: int) -> torch.nn.Module:
    """Of the same architecture."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers, "vocab_size": 64,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **small))


def _warm_up(folder: Path, world: World) -> None:
    """A step of a tiny model: libraries load and threads start at first use, which is no model's memory."""
    tiny = tiny_model(folder, 1)
    optimizer = torch.optim.AdamW(tiny.parameters(), fused=True)
    tiny(input_ids=torch.arange(32)[None]).logits.sum().backward()
    torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
    optimizer.step()
    world.barrier()


def device_rates(folder: Path, world: World) -> dict[str, float]:
    """What this rank's core does while the others do the same: fields of sizing.Device."""
    def seconds(work: Callable[[], object], times: int) -> float:
        work()
        world.barrier()
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    a, big, small = torch.ones(1024, 1024), torch.ones(8 * 2**20), torch.ones(1)
    around = 2 * (world.size - 1) / world.size
    latency = seconds(lambda: dist.all_reduce(small), 50)
    all_reduce = seconds(lambda: dist.all_reduce(big), 4)
    half, parts = big[:len(big) // world.size].clone(), big.chunk(world.size)

    # as DeepSpeed does both: what is sent whole is copied, rank by rank
    def gather_and_scatter() -> None:
        gathered = torch.empty_like(big)
        dist.all_gather_into_tensor(gathered, half)
        torch.cat(gathered.chunk(world.size))
        dist.reduce_scatter_tensor(half, torch.cat(parts))

    layers, ids = 8, torch.arange(32)[None]
    tiny = tiny_model(folder, layers)
    plain = seconds(lambda: tiny(input_ids=ids).logits.sum().backward(), 8)
    config = deepspeed_config(compose(["model.path=m"]).zero, compose(["model.path=m"]).optim, bf16=False, on_gpu=False)
    deepspeed.utils.set_z3_leaf_modules(tiny, [type(decoder_layers(tiny)[0])])           # as in policy/zero.py
    engine = deepspeed.initialize(model=tiny, optimizer=torch.optim.AdamW(tiny.parameters()), config=config)[0]
    hooked = seconds(lambda: engine.backward(engine(input_ids=ids).logits.sum()), 8)
    weights = [torch.nn.Parameter(torch.ones(2**21)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(2**21)
    optimizer = torch.optim.AdamW(weights, fused=True)
    return {"flops": 2 * 1024**3 / seconds(lambda: torch.mm(a, a), 8), "latency": latency,
            "link": around * 4 * big.numel() / all_reduce, "sharded_share": all_reduce / seconds(gather_and_scatter, 4),
            "hook": (hooked - plain) / (2 * layers), "bandwidth": 28 * 2**22 / seconds(optimizer.step, 4)}


def main(steps: int, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    config = compose(overrides)
    world = World.start(config.cluster)
    _warm_up(Path(config.model.path), world)
    baseline = peak_bytes("VmRSS")
    folder = Path(config.model.path)
    pairs = prepare(config.data, None, None)[0]
    flops = forward_flops(read_config(folder)).training(frozen_base=config.model.lora.rank > 0)
    clock = PhaseClock(world)
    policy = make_policy(config, ModelFolder(folder), "branch", world)
    clock.mark("load")
    per_step = config.train.pairs_per_step
    check_packing(policy, pairs, np.arange(per_step), torch.float32)
    clock.mark("gate")
    seconds, cpu_seconds, work = [], [], None
    for step in range(steps):
        ids = np.arange(step * per_step, (step + 1) * per_step) % len(pairs)
        batches = step_batches(pairs, ids, config.loss, world, config.train.tokens_per_microbatch, flops)
        clock.mark(None)
        world.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        train_step(policy, None, batches, config.loss, MetricSums(config.loss, world.device), world, clock)
        policy.step(1e-4)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - began_cpu)
        clock.mark("step")
        work = batches.work
    measured = {"seconds": seconds, "cpu_seconds": cpu_seconds, "baseline": baseline,
                "peaks": {k: v - baseline for k, v in clock.peaks.items()}, "micro_steps": len(batches.batches),
                "tokens": work.tokens, "flops": work.flops,
                "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in policy.model.parameters())}
    measured["device"] = device_rates(folder, world)
    everyone = world.gather(measured)
    if world.is_main:
        peaks = {phase: max(one["peaks"][phase] for one in everyone) for phase in PHASES}
        measured["cpu_seconds"] = np.mean([one["cpu_seconds"] for one in everyone], 0).tolist()
        print(json.dumps({**measured, "peaks": peaks, "peak": max(peaks.values())}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
    # an ordinary exit is aborted by gloo's threads now and then
    exit_with(0)
