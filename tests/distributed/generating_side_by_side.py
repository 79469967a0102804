"""Run on one and two ranks by test_samples.py: what the policy generates amid training is what its exported model
generates, and training does not notice."""
from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import write_rows
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.folder import read_config
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.weights import write_shards
from dpo_dist.policy import Policy
from dpo_dist.policy.generate import Ids, Sampling, generate
from dpo_dist.policy.make import make_policy
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.world import World
from dpo_dist.step import step_batches, train_step

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 2,
         "eos_token_id": 1, "pad_token_id": 0}
# heads scaled and bounded, attention bounded and with a window, positions learned
MODELS = {"llama": {}, "granite": {"logits_scaling": 0.3, "attention_multiplier": 0.4},
          "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 6, "head_dim": 8,
                     "query_pre_attn_scalar": 8},
          "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}}
ONE_RANK = [("llama", "none", []), ("granite", "none", []), ("gemma2", "none", ["model.lora.rank=4"]),
            ("gpt2", "none", []), ("llama", "none", ["model.attention=padded"])]
TWO_RANKS = [("llama", "zero3", ["zero.persistence_threshold=0"]), ("granite", "zero2", []),
             ("gemma2", "zero3", ["zero.persistence_threshold=0", "model.lora.rank=4"])]
STOP = tuple(range(1, 13))
LONGEST = 10


def prompts() -> list[Ids]:
    r = random.Random(0)
    return [tuple(r.randrange(3, 64) for _ in range(r.randint(1, 30))) for _ in range(7)]


def plain(folder: Path) -> list[Ids]:
    """Greedy completions by the exported model in plain transformers: one prompt at a time, no padding."""
    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    how = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=list(STOP), pad_token_id=63)
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        found.append(tuple(out[0, len(prompt):].tolist()))
    return found


def write_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind]})).save_pretrained(folder)


def trained(policy: Policy, config: object, world: World, pairs: object, sampling: bool) -> list[object]:
    """Losses of two steps, between which the policy generates, or does not; then its weights."""
    flops = forward_flops(read_config(Path(config.model.path))).training(frozen_base=False)
    batches = step_batches(pairs, np.arange(8), config.loss, world, 400, flops)
    seen: list[object] = []
    for _ in range(2):
        sums = MetricSums(config.loss, world.device)
        seen.append(train_step(policy, None, batches, config.loss, sums, world, Clock(world)).item())
        seen.append(float(policy.step(1e-2)))
        if sampling:
            generate(policy, prompts(), Sampling(STOP, 4, temperature=1.0, tokens_at_once=60), world)
    return [*seen, *(tensor for _, tensor in policy.export_weights())]


def main(folder: Path) -> None:
    world = World.start(compose(["model.path=unused", "cluster.device=cpu", "cluster.timeout_seconds=60"]).cluster)
    for number, (kind, zero, more) in enumerate(ONE_RANK if world.size == 1 else TWO_RANKS):
        model = folder / kind
        if world.is_main:
            write_model(model, kind)
            write_rows(folder / "rows.jsonl", 8)
        world.barrier()
        config = compose([f"model.path={model}", f"data.train=[{{path: {folder}/rows.jsonl, format: token_ids}}]",
                          f"zero={zero}", "loss=simpo", "model.dtype=fp32", f"data.cache_dir={folder / 'tokens'}",
                          "model.gradient_checkpointing=true", *more])
        pairs = world.on_main(lambda config=config: prepare(config.data, None, None)[0])
        attention = "padded" if config.model.attention == "padded" else "branch"

        def run(sampling: bool, config=config, pairs=pairs, attention=attention) -> tuple[Policy, list[object]]:
            policy = make_policy(config, ModelFolder(Path(config.model.path)), attention, world)
            return policy, trained(policy, config, world, pairs, sampling)

        (_, without), (policy, amid) = run(False), run(True)
        assert len(without) == len(amid) and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(without, amid, strict=True)), f"{kind} {zero}: generating changed the training"
        greedy = generate(policy, prompts(), Sampling(STOP, LONGEST, tokens_at_once=150), world)
        drawn = [generate(policy, prompts(), Sampling(STOP, LONGEST, 1.5, seed=seed), world) for seed in (3, 3, 4)]
        assert drawn[0] == drawn[1] != drawn[2], "what is drawn follows from the seed"
        exported = folder / f"exported-{number}"
        if world.is_main:
            exported.mkdir()
            (exported / "config.json").write_bytes((model / "config.json").read_bytes())
        write_shards(exported, policy.export_weights(), write=world.is_main)
        if world.is_main:
            assert greedy == plain(exported), f"{kind} {zero}"
            ended = sum(ids[-1] in STOP for ids in greedy)
            print(f"{kind} {zero} ok, {ended} ended, {sum(len(ids) == LONGEST for ids in greedy)} did not", flush=True)
        world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_with(0)
