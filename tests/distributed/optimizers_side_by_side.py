"""Run on ranks by test_optimizers.py: every optimizer under ZeRO is its library's own, leaves out an unsound step, and
goes on from a checkpoint to the same bits."""
from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_dist.config.compose import compose
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.models.load import ScoredModel, load_causal_lm, torch_dtype
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy import Policy
from dpo_dist.policy.make import make_policy
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-6, 0.1
WORDS = [f"optim.betas={list(BETAS)}", f"optim.eps={EPS}", f"optim.weight_decay={DECAY}", "optim.max_grad_norm=null",
         "cluster.device=cpu", "model.gradient_checkpointing=false", "cluster.timeout_seconds=60"]
# How far from one process, and from the library's optimizer, over how far the weights moved. Muon rounds gradients to
# bf16, where another last bit of fp32 may tip a value; 8-bit blocks are cut elsewhere. The library's is in fp32.
FROM_ALONE = {"cpu_adam": 1e-5, "muon": 1e-6, "adamw_8bit": 0.05}
FROM_LIBRARY = {"cpu_adam": 1e-5, "muon": 0.02, "adamw_8bit": 0.05}


def packs() -> Iterator[PackedBatch]:
    r = random.Random(0)
    while True:
        prompt, first, second = (tuple(r.randrange(3, 64) for _ in range(20)) for _ in range(3))
        yield pack_sequences([Sequences(prompt, (first, second))])


def loss(logps: Tensor) -> Tensor:
    return -0.01 * logps.sum()


def step(policy: Policy, pack: PackedBatch, world: World, sound: bool = True) -> None:
    """Every rank has the same pack, so that its share of the loss is exact."""
    share = loss(policy.token_logps(pack).logps) / world.size
    policy.backward(share if sound else share * float("nan"), is_last=True)
    policy.step(LR, skip=torch.tensor(0.0 if sound else 1.0))


def weights(policy: Policy) -> Tensor:
    """All of them, as they would be exported: whole on rank 0, empty elsewhere."""
    return torch.cat([tensor.float().flatten() for _, tensor in policy.export_weights()])


def of_the_library(name: str, model: nn.Module) -> Callable[[], None]:
    """The update by the library's own optimizers, told apart by the names of Llama's weights."""
    named = dict(model.named_parameters())
    hidden = [p for n, p in named.items() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in named.items() if not (p.ndim == 2 and ".layers." in n)]
    how = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon":
        muon = torch.optim.Muon(hidden, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        optimizers = [muon, torch.optim.AdamW(rest, **how)]
    elif name == "adamw_8bit":
        import bitsandbytes

        small = [p for n, p in named.items() if "embed" in n or p.numel() < 4096]
        large = [p for n, p in named.items() if not ("embed" in n or p.numel() < 4096)]
        optimizers = [bitsandbytes.optim.AdamW8bit(large, **how), bitsandbytes.optim.AdamW(small, optim_bits=32, **how)]
    else:
        optimizers = [torch.optim.AdamW(named.values(), **how)]

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return update


def trained_plainly(name: str, folder: Path, config: RunConfig, steps: int) -> tuple[Tensor, Tensor]:
    """(weights before, weights after so many steps), without a policy of ours, in fp32."""
    model = ScoredModel(load_causal_lm(folder, torch.float32, "branch"), "branch").train()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    update = of_the_library(name, model)
    for pack, _ in zip(packs(), range(steps), strict=False):
        loss(model(pack)[0]).backward()
        update()
    return before, torch.cat([p.detach().flatten() for p in model.parameters()])


def trained_alone(config: RunConfig, folder: Path, steps: int) -> Tensor:
    """Weights after so many steps in one process."""
    model = ScoredModel(load_causal_lm(folder, torch_dtype(config.model, torch.device("cpu")), "branch"), "branch")
    adamw = compose([f"model.path={folder}", *WORDS]).optim
    policy = SinglePolicy(model, adamw if config.optim.name == "cpu_adam" else config.optim, torch.device("cpu"))
    for pack, _ in zip(packs(), range(steps), strict=False):
        policy.backward(loss(policy.token_logps(pack).logps), is_last=True)
        policy.step(LR, skip=torch.tensor(0.0))
    return weights(policy)


def check(name: str, words: list[str], folder: Path, saved: Path) -> None:
    config = compose([f"model.path={folder}", f"optim={name}", *WORDS, *words])
    world = World.start(config.cluster)
    first, second, third = (pack for pack, _ in zip(packs(), range(3), strict=False))

    policy = make_policy(config, ModelFolder(folder), "branch", world)
    step(policy, first, world)
    step(policy, second, world)
    step(policy, second, world, sound=False)
    if world.is_main:
        saved.mkdir()
    world.barrier()
    for file, tensors in policy.files().items():
        tensors.write(saved / file)
    world.barrier()
    step(policy, third, world)
    straight = weights(policy)

    resumed = make_policy(config, ModelFolder(folder), "branch", world)
    resumed.load(saved)
    step(resumed, third, world)
    assert torch.equal(weights(resumed), straight), f"{name} {words}: other bits after a resume"

    if world.is_main:
        before, plain = trained_plainly(name, folder, config, 3)
        moved, allowed = (plain - before).norm(), 0.3 if config.model.dtype == "bf16" else FROM_LIBRARY[name]
        apart = ((straight - plain).norm() / moved).item()
        assert apart < allowed, f"{name} {words}: {apart:.2g} from the library's"
        alone = ((straight - trained_alone(config, folder, 3)).norm() / moved).item()
        assert alone < FROM_ALONE[name], f"{name} {words}: {alone:.2g} from one process"
        print(f"{name} {words} ok: {apart:.2g}, {alone:.2g}", flush=True)


def main(folder: str, scratch: str, *cases: str) -> int:
    for number, case in enumerate(cases):
        name, *words = case.split()
        check(name, words, Path(folder), Path(scratch) / str(number))
    return 0


if __name__ == "__main__":
    exit_with(main(*sys.argv[1:]))
