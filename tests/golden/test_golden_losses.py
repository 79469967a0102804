"""Log-probs, losses, gradients and rewards equal those of TRL 1.16's DPO trainer on a real model (see README.md
here)."""
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.logps import pair_logps, plain_token_logps
from dpo_dist.losses import preference_loss, rewards
from dpo_dist.types import PackedBatch, PairLogps, TokenLogps

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())
ROWS = json.loads((HERE / "rows.json").read_text())
PRECISIONS = ("float32", "float64")
CASES = sorted(GOLDEN["float32"]["cases"])
NAMED_PARAMETERS = {"grad_norm_lm_head": "lm_head.weight", "grad_norm_embed": "model.embed_tokens.weight",
                    "grad_norm_l0_q": "model.layers.0.self_attn.q_proj.weight"}


@dataclass(frozen=True)
class Scored:
    """The golden rows as seen by the policy (with gradient) and the reference."""

    policy: PreTrainedModel
    batch: PackedBatch
    policy_tokens: TokenLogps
    reference_tokens: Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def completions() -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of the 16 sequences: the 8 chosen, then the 8 rejected."""
    return [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in ROWS]


def unpacked_batch() -> PackedBatch:
    """What the reduction from tokens to pairs needs to know of 16 sequences that were forwarded one by one."""
    lengths = [len(completion) for _, completion in completions()]
    none, pairs = torch.empty(0, dtype=torch.int64), len(ROWS)
    return PackedBatch(
        input_ids=none[None], position_ids=none[None], trees=(), predict_at=none, targets=none,
        sequence=torch.repeat_interleave(torch.arange(2 * pairs), torch.tensor(lengths)),
        offset=torch.cat([torch.arange(n) for n in lengths]), lengths=torch.tensor(lengths), chosen=torch.arange(pairs),
        rejected=torch.arange(pairs, 2 * pairs), pair_ids=tuple(range(pairs)), weight=torch.ones(pairs),
        strength=torch.full((pairs,), torch.nan))


def load(name: str, precision: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32, local_files_only=True)
    return model.to(getattr(torch, precision)).eval()


def token_logps(model: PreTrainedModel) -> Tensor:
    return torch.cat([plain_token_logps(model, torch.tensor(p), torch.tensor(c)) for p, c in completions()])


def log_collisions(model: PreTrainedModel) -> Tensor:
    """log of the sum over the vocabulary of p² at each completion token, from plain logits."""
    out = []
    for prompt, completion in completions():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1:-1]
        out.append(logits.softmax(-1).square().sum(-1).log())
    return torch.cat(out)


@cache
def scored(precision: str) -> Scored:
    policy = load("policy", precision)
    with torch.no_grad():
        reference_tokens = token_logps(load("ref", precision))
        collisions = log_collisions(policy)
    return Scored(policy, unpacked_batch(), TokenLogps(token_logps(policy), collisions), reference_tokens)


def loss_config(case: str, args: dict[str, Any]) -> LossConfig:
    """The LossConfig that says what these TRL arguments say. Options that a loss does not use are not passed on."""
    names, smoothing = args["loss_type"], args.get("label_smoothing")
    uses_beta = names != ["sft"]
    return resolve_loss(LossConfig(
        name=names[0] if len(names) == 1 else "mixture",
        terms=None if len(names) == 1 else dict(zip(names, args["loss_weights"], strict=True)),
        beta=args["beta"] if uses_beta else None,
        label_smoothing=smoothing or None,                  # 0.0 is TRL's way of saying none
        f_divergence=args.get("f_divergence_type"), f_alpha=args.get("f_alpha_divergence_coef"),
        ld_alpha=args.get("ld_alpha"), wpo=True if case.startswith("wpo_") else None))


def pairs_of(case: str, precision: str) -> tuple[PairLogps, LossConfig, dict[str, Any]]:
    golden, data = GOLDEN[precision]["cases"][case], scored(precision)
    loss = loss_config(case, golden["args"])
    reference = data.reference_tokens if loss.needs_reference else None
    mean_chosen_tokens = sum(len(row["chosen_ids"]) for row in ROWS) / len(ROWS)
    return pair_logps(data.batch, data.policy_tokens, reference, loss, mean_chosen_tokens), loss, golden


def test_every_golden_case_is_held() -> None:
    assert len(CASES) == 58 and sorted(GOLDEN["float64"]["cases"]) == CASES


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["policy", "ref"])
def test_logps_equal_trl_per_token_and_per_sequence(name: str, precision: str) -> None:
    data, golden = scored(precision), GOLDEN[precision]["logps"][name]
    ours = data.policy_tokens.logps.detach() if name == "policy" else data.reference_tokens
    expected = golden["chosen_tok"] + golden["rejected_tok"]
    split = ours.split([len(tokens) for tokens in expected])
    lengths = [len(tokens) for tokens in expected]
    assert lengths == golden["chosen_len"] + golden["rejected_len"] == data.batch.lengths.tolist()
    for tokens, golden_tokens, golden_sum in zip(split, expected, golden["chosen"] + golden["rejected"], strict=True):
        assert tokens.tolist() == pytest.approx(golden_tokens, abs=5e-5, rel=0)
        assert tokens.double().sum().item() == pytest.approx(golden_sum, abs=5e-5, rel=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_trl(case: str, precision: str) -> None:
    pairs, loss, golden = pairs_of(case, precision)
    value = preference_loss(pairs, loss).mean()
    assert value.item() == pytest.approx(golden["loss"], rel=2e-5)

    parameters = dict(scored(precision).policy.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values()), retain_graph=True),
                         strict=True))
    norms = {key: gradients[name].double().norm().item() for key, name in NAMED_PARAMETERS.items()}
    norms["grad_norm"] = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    assert norms == pytest.approx({key: golden[key] for key in norms}, rel=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("sft")])
def test_rewards_equal_trl_under_every_loss_and_mixture(case: str) -> None:
    pairs, loss, golden = pairs_of(case, "float64")
    both = rewards(pairs, loss)
    assert both is not None
    chosen, rejected = both
    assert not chosen.requires_grad and not rejected.requires_grad
    metrics = golden["metrics"]
    ours = {"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/accuracies": (chosen > rejected).double().mean().item(),
            "logps/chosen": pairs.policy_chosen.mean().item(), "logps/rejected": pairs.policy_rejected.mean().item()}
    assert ours == pytest.approx({key: metrics[key] for key in ours}, abs=5e-5, rel=0)


def test_sft_alone_has_no_reward_and_needs_no_reference() -> None:
    pairs, loss, _ = pairs_of("sft_b0.1", "float32")
    assert pairs.reference_chosen is None and rewards(pairs, loss) is None
