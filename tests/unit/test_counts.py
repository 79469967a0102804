"""Of a completion that holds turns of others, only the tokens that count are learned: loss and gradient are those of
the plain definition, whatever packs, attends or knows the reference."""
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_rows, write_tiny_llama

from dpo_dist.config.compose import compose
from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.logps import plain_token_logps
from dpo_dist.losses import preference_loss
from dpo_dist.models.load import ScoredModel, load_causal_lm
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.ahead import AheadReference, Scorer
from dpo_dist.reference.cache.fill import fill, plan_fill
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.hf import HfReference
from dpo_dist.run.metrics import MetricSums
from dpo_dist.run.perf import Clock
from dpo_dist.runtime.world import World
from dpo_dist.sizing.flops import Flops
from dpo_dist.step import StepBatches, step_batches, train_step
from dpo_dist.types import PairLogps

FLOPS = Flops(1e5, 1e4, ((1e3, None),))
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
Row = dict[str, Any]
Gradients = dict[str, torch.Tensor]


def with_counts(rows: list[Row], seed: int = 0) -> list[Row]:
    """The rows with some of each completion's tokens counted; in every third row all of the rejected one's, unsaid."""
    r = random.Random(seed)
    out = []
    for i, row in enumerate(rows):
        counts = {}
        for side in ("chosen", "rejected")[:1 if i % 3 == 0 else 2]:
            flags = [r.randint(0, 1) for _ in row[f"{side}_ids"]]
            flags[r.randrange(len(flags))] = 1
            counts[f"{side}_counts"] = flags
        out.append({**row, **counts})
    return out


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Prompts and completions that several pairs share; one completion of which two pairs count different tokens."""
    rows = with_counts(write_rows(tmp_path / "x", 7))
    long = [*range(10, 30), 1]
    shared = {"prompt_ids": [5, 6, 7], "chosen_ids": long, "rejected_ids": [9, 9, 1]}
    return [*rows, rows[1], {**shared, "chosen_counts": [1, 0, 1] * 7}, {**shared, "chosen_counts": [0, 0, 1] * 7},
            {**shared, "rejected_ids": [4, 4, 4, 1], "chosen_counts": [1, 0, 1] * 7}]


@pytest.fixture
def store(tmp_path: Path) -> Callable[[list[Row]], PairStore]:
    def made(rows: list[Row]) -> PairStore:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare(compose(["model.path=m", f"data.train=[{{path: {path}, format: token_ids}}]",
                                f"data.cache_dir={tmp_path / 'tokens'}"]).data, None, None)[0]

    return made


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "policy", seed=0)


@pytest.fixture
def reference_folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "reference", seed=1)


def cut(pairs: PairStore, loss: LossConfig, tokens_per_microbatch: int = 130, padded: bool = False) -> StepBatches:
    return step_batches(pairs, np.arange(len(pairs)), loss, ALONE, tokens_per_microbatch,
                        replace(FLOPS, padded=padded))


def ours(folder: Path, attention: str, reference: ReferenceEngine, pairs: PairStore,
         loss: LossConfig) -> tuple[float, Gradients]:
    policy = SinglePolicy(ScoredModel(load_causal_lm(folder, torch.float32, attention), attention),
                          compose(["model.path=m"]).optim, ALONE.device)
    step = cut(pairs, loss, padded=attention == "padded")
    assert len(step.batches) > 1
    total = train_step(policy, reference if loss.needs_reference else None, step, loss, MetricSums(loss, ALONE.device),
                       ALONE, Clock(ALONE))
    return total.item(), {name.removeprefix("lm."): p.grad for name, p in policy.model.named_parameters()
                          if p.grad is not None}


# ------------------------------------------------------------------------------------------------- the plain definition


def by_definition(folder: Path, reference_folder: Path, rows: list[Row], loss: LossConfig) -> tuple[float, Gradients]:
    """(loss, gradients) by the model's own forward of one completion after the other, of which the counted tokens are
    picked out."""
    model, reference = (load_causal_lm(at, torch.float32, "padded") for at in (folder, reference_folder))
    sums: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        counted = {side: torch.tensor(row.get(f"{side}_counts", [1] * len(row[f"{side}_ids"]))).bool()
                   for side in ("chosen", "rejected")}
        shorter = min(int(c.sum()) for c in counted.values())
        excess = 0.0
        for side, counts in counted.items():
            prompt, ids = torch.tensor(row["prompt_ids"]), torch.tensor(row[f"{side}_ids"])
            logps = plain_token_logps(model, prompt, ids)[counts].double()
            with torch.no_grad():
                reference_logps = plain_token_logps(reference, prompt, ids)[counts].double()
                logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1:-1][counts]
            collision = logits.log_softmax(-1).mul(2).logsumexp(-1)
            scale = torch.ones(len(logps), dtype=torch.float64)
            scale[shorter:] = 1.0 if loss.ld_alpha is None else loss.ld_alpha
            excess += float((logps.detach() - collision).mean())
            for name, value in (("policy", (logps * scale).sum()), ("whole", logps.sum()),
                                ("reference", (reference_logps * scale).sum())):
                sums.setdefault(f"{name}_{side}", []).append(value)
            sums.setdefault(f"{side}_tokens", []).append(torch.tensor(float(len(logps)), dtype=torch.float64))
        sums.setdefault("wpo_weight", []).append(torch.tensor(min(1.0, float(np.exp(excess))), dtype=torch.float64))
    pairs = {name: torch.stack(values) for name, values in sums.items()}
    value = preference_loss(PairLogps(**pairs, strength=torch.full((len(rows),), torch.nan),
                                      mean_chosen_tokens=pairs["chosen_tokens"].mean()), loss).mean()
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


LOSSES = [LossConfig("sigmoid", beta=0.5), LossConfig("ipo", beta=0.5), LossConfig("sft"), LossConfig("simpo"),
          LossConfig("sigmoid", ld_alpha=0.3), LossConfig("sigmoid", wpo=True),
          LossConfig("mixture", terms={"sigmoid": 1.0, "sft": 0.3})]


@pytest.mark.parametrize("attention", ["branch", "padded"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_and_gradient_are_those_of_the_counted_tokens_alone(
        loss: LossConfig, attention: str, rows: list[Row], store: Callable[[list[Row]], PairStore], policy_folder: Path,
        reference_folder: Path):
    loss = resolve_loss(loss)
    wanted, wanted_gradients = by_definition(policy_folder, reference_folder, rows, loss)
    reference = HfReference(ModelFolder(reference_folder), torch.float32, attention, ALONE.device)
    found, gradients = ours(policy_folder, attention, reference, store(rows), loss)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name
    unlike, _ = by_definition(policy_folder, reference_folder, [
        {key: value for key, value in row.items() if "counts" not in key} for row in rows], loss)
    assert abs(unlike - wanted) > 1e-3 * abs(wanted), "what does not count would have mattered"


def test_counting_every_token_is_counting_none_apart(rows: list[Row], store: Callable[[list[Row]], PairStore]):
    bare = [{key: value for key, value in row.items() if "counts" not in key} for row in rows]
    said = store([{**row, "chosen_counts": [1] * len(row["chosen_ids"])} for row in bare])
    unsaid = store(bare)
    assert said.digest == unsaid.digest and np.array_equal(said.content, unsaid.content)
    assert [replace(said[i], where="") for i in range(len(said))] == [replace(unsaid[i], where="")
                                                                      for i in range(len(said))]


# ---------------------------------------------------------------------------------------------------------- references


def test_a_cache_filled_without_counts_knows_all_and_every_reference_gives_the_same_values(
        rows: list[Row], store: Callable[[list[Row]], PairStore], reference_folder: Path, tmp_path: Path, world: World):
    bare = [{key: value for key, value in row.items() if "counts" not in key} for row in rows]
    live, cache = (HfReference(ModelFolder(reference_folder), torch.float32, "branch", world.device),
                   LogpCache(str(tmp_path / "cache"), ReferenceKey("weights", "fp32")))
    unscored, _ = plan_fill(cache, [store(bare)], world, 200)
    fill(unscored, cache, [store(bare)], live, world)

    pairs = store(rows)
    missing, _ = plan_fill(cache, [pairs], world, 200)
    assert (missing.n_packs, missing.n_cached) == (0, len(unscored.sequences))
    ahead = AheadReference(cache, world, Scorer(tmp_path / "scorer", 1.0), print)
    cached = CachedReference(cache)
    step = cut(pairs, resolve_loss(LossConfig("sigmoid")))
    ahead.wait_for(step.batches)
    for batch in step.batches:
        wanted = live.token_logps(batch)
        assert wanted.shape == batch.targets.shape
        for engine in (cached, ahead):
            assert torch.allclose(engine.token_logps(batch), wanted, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- planning


def test_the_plan_shares_a_completion_exactly_where_the_pack_does(rows: list[Row],
                                                                  store: Callable[[list[Row]], PairStore]):
    pairs = store(rows)
    step = cut(pairs, resolve_loss(LossConfig("sigmoid")), tokens_per_microbatch=10_000)
    assert sum(batch.n_tokens for batch in step.batches) == step.work.tokens
    (batch,) = step.batches
    chosen = dict(zip(batch.pair_ids, batch.chosen.tolist(), strict=True))
    first, other, again = (chosen[len(rows) - n] for n in (3, 2, 1))
    assert first == again != other, "the same tokens counted, and others"
    assert batch.lengths[[first, other]].tolist() == [14, 7]


def test_the_mean_of_a_token_mean_is_over_counted_tokens_weighted_as_the_pairs_are(
        rows: list[Row], store: Callable[[list[Row]], PairStore]):
    weighted = [{**row, "weight": 1.0 + i} for i, row in enumerate(rows)]
    counted = [sum(row["chosen_counts"]) for row in weighted]
    wanted = np.average(counted, weights=[row["weight"] for row in weighted])
    assert cut(store(weighted), resolve_loss(LossConfig("sft"))).mean_chosen_tokens == pytest.approx(wanted)
