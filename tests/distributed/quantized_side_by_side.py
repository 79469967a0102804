"""Run on two ranks by test_quantized.py: adapters on 4-bit weights are trained as plain transformers, peft and
bitsandbytes train them, under every ZeRO stage, recomputed, evaluated in between; and export merged."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_dist.config.compose import compose
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.pack import pack_pairs
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.logps import plain_token_logps
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.folder import read_config
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy import Policy
from dpo_dist.policy.make import make_policy
from dpo_dist.reference.adapter_off import AdapterOffReference
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.step import step_batches, train_step

PAIRS, STEPS, LR, SEED = 8, 3, 1e-2, 3
STAGES = (["zero=zero0"], ["zero=zero1"], ["zero=zero2", "model.gradient_checkpointing=1"],
          ["zero=zero3", "zero.persistence_threshold=0"])


def plain(model: str, pairs: PairStore, config: RunConfig) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) of each step, written out."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=how)
    torch.manual_seed(SEED)
    lm = get_peft_model(lm, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=config.optim.betas, eps=config.optim.eps,
                                  weight_decay=config.optim.weight_decay)

    def sums(i: int) -> list[torch.Tensor]:
        pair = pairs[i]
        return [plain_token_logps(lm, torch.tensor(pair.prompt_ids), torch.tensor(ids)).sum()
                for ids in (pair.chosen_ids, pair.rejected_ids)]

    with torch.no_grad(), lm.disable_adapter():
        reference = [sums(i) for i in range(PAIRS)]
    for _ in range(STEPS):
        margins = [sums(i) for i in range(PAIRS)]
        loss = sum(-F.logsigmoid(config.loss.beta * ((chosen - c) - (rejected - r)))
                   for (chosen, rejected), (c, r) in zip(margins, reference, strict=True)) / PAIRS
        loss.backward()
        yield loss.item(), torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm or float("inf")).item()
        optimizer.step()
        optimizer.zero_grad()


def trained(policy: Policy, model: str, pairs: PairStore, config: RunConfig,
            world: World) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) of each step by our own policy."""
    flops = forward_flops(read_config(Path(model))).training(frozen_base=True)
    batches = step_batches(pairs, np.arange(PAIRS), config.loss, world, 400, flops)
    for _ in range(STEPS):
        sums = MetricSums(config.loss, world.device)
        train_step(policy, AdapterOffReference(policy), batches, config.loss, sums, world, Clock(world))
        norm = policy.step(LR)
        yield sums.means(world)["loss"], norm.item()


def check_layers(policy: Policy) -> None:
    """Every linear layer of the backbone is in 4 bits, and nothing else."""
    kinds = {name: type(module) for name, module in policy.model.causal.named_modules()}
    four_bit = [name for name, kind in kinds.items() if kind is Linear4bit]
    assert len(four_bit) == 14 and all(isinstance(policy.model.causal.get_submodule(name).weight, Params4bit)
                                       for name in four_bit), kinds
    assert {str(p.dtype) for p in policy.model.parameters()} == {"torch.uint8", "torch.float32"}
    assert policy.model.head.weight.dtype == torch.float32
    assert not [name for name in policy.model.state_dict() if "absmax" in name]


def check_export(policy: Policy, model: str, pairs: PairStore) -> None:
    """The merged weights, in plain transformers, give the policy's log-probs."""
    merged = dict(policy.export_weights())
    batch = pack_pairs([pairs[i] for i in range(PAIRS)], list(range(PAIRS)), [1.0] * PAIRS)
    with policy.evaluating():
        mine = policy.token_logps(batch).logps
    if not merged["lm_head.weight"].numel():
        return                                           # not on the first rank
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lm.load_state_dict(merged)
    completions = [(pair.prompt_ids, ids) for pair in (pairs[i] for i in range(PAIRS))
                   for ids in (pair.chosen_ids, pair.rejected_ids)]
    with torch.no_grad():
        theirs = torch.cat([plain_token_logps(lm, torch.tensor(prompt), torch.tensor(ids))
                            for prompt, ids in completions])
    assert (mine.sort().values - theirs.sort().values).abs().max() < 1e-5


def main(model: str, rows: str, cache: str) -> int:
    wanted = None
    for stage in STAGES:
        config = compose([f"model.path={model}", f"data.train=[{{path: {rows}, format: token_ids}}]",
                          "model.lora.rank=4", "model.quantization=nf4", "reference=adapter_off", "model.dtype=fp32",
                          "cluster.device=cpu", f"data.cache_dir={cache}", f"train.seed={SEED}", "loss.beta=0.5",
                          "model.gradient_checkpointing=false", *stage])
        world = World.start(config.cluster)
        pairs = world.on_main(lambda config=config: prepare(config.data, None, None)[0])
        wanted = wanted or list(plain(model, pairs, config))
        policy = make_policy(config, ModelFolder(Path(model)), "branch", world)
        check_layers(policy)
        found = list(trained(policy, model, pairs, config, world))
        assert wanted[0][0] > wanted[-1][0] + 0.01, "they learn"
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6, err_msg=str(stage))
        check_export(policy, model, pairs)
    print("all stages agree")
    return 0


if __name__ == "__main__":
    exit_with(main(*sys.argv[1:]))
