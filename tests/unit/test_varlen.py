"""The kernel that computes attention on a GPU is tried before it is used: a wrong one is found out, and what is used is
told."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from dpo_dist.models import varlen
from dpo_dist.models.attention import describe_attention
from dpo_dist.models.varlen import TRIAL_ERROR, choose_kernel, plain, trial

CPU = torch.device("cpu")
SHAPES = [(14, 2, 64), (8, 8, 16), (4, 1, 20)]               # heads, key heads, head size


@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_kernel_passes_the_trial_in_bf16(shape: tuple[int, int, int]):
    assert trial(plain, CPU, torch.float32, *shape) < 1e-6
    assert 0 < trial(plain, CPU, torch.bfloat16, *shape) < TRIAL_ERROR


def heads_in_another_order(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
    return plain(q.flip(1), k, v, *rest).flip(1)


def aligned_at_the_upper_left(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *rest) -> Tensor:
    """Causal from each sequence's first key on: the queries do not see their prompt whole."""
    out = []
    for i in range(len(q_starts) - 1):
        a, b, c = int(q_starts[i]), int(q_starts[i + 1]), int(k_starts[i])
        starts = torch.tensor([0, b - a], dtype=torch.int32)
        out.append(plain(q[a:b], k[c:c + b - a], v[c:c + b - a], starts, starts, *rest))
    return torch.cat(out)


def one_key_too_many(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int,
                     scale: float | None, window: int | None) -> Tensor:
    return plain(q, k, v, q_starts, k_starts, max_q, max_k, scale, 40)


@pytest.mark.parametrize("wrong", [heads_in_another_order, aligned_at_the_upper_left, one_key_too_many])
def test_a_kernel_with_another_mask_or_another_order_of_heads_fails_the_trial(wrong):
    assert trial(wrong, CPU, torch.bfloat16, 14, 2, 64) > TRIAL_ERROR


def test_a_kernel_with_wrong_gradients_alone_fails_the_trial():
    def forgets_the_prompts_gradient(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
        return plain(q, k.detach() + 0 * k, v, *rest)

    def gives_no_number_to_the_values(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
        v.register_hook(lambda gradient: gradient * torch.nan)
        return plain(q, k, v, *rest)

    assert trial(forgets_the_prompts_gradient, CPU, torch.bfloat16, 8, 2, 16) > TRIAL_ERROR
    assert not trial(gives_no_number_to_the_values, CPU, torch.bfloat16, 8, 2, 16) < TRIAL_ERROR, "NaN is not small"


def test_what_is_used_is_told_with_the_reasons_against_what_is_faster(monkeypatch: pytest.MonkeyPatch):
    assert choose_kernel(CPU, torch.bfloat16, 8, 2, 16).kernel is None
    assert describe_attention(LlamaConfig(), torch.bfloat16, CPU) is None
    there = torch.device("cuda", 0)
    for dtype, says in ((torch.float32, "not in float32"), (torch.bfloat16, "FlashAttention 3: ModuleNotFoundError")):
        # this machine has no GPU: every candidate fails, and says why
        message = str(choose_kernel(there, dtype, 8, 2, 16))
        assert says in message and message.startswith("one masked call for each prompt and branch, which is slow")


def test_the_keys_of_torchs_own_kernel_are_repeated_only_as_a_last_resort():
    assert list(varlen.CANDIDATES)[-1].endswith("over repeated keys")
