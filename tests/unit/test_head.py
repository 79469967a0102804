"""The blockwise head gives the log-probs, and the gradients, of a plain log_softmax over whole logits."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_dist.models.head import PLAIN, TRIAL_ERROR, BlockwiseLogps, LogpHead, Passes, kernels_misfit, trial
from dpo_dist.sizing import logit_blocks
from dpo_dist.sizing.logit_blocks import Blocks, plan_blocks

TOKENS, HIDDEN, VOCABULARY = 11, 7, 13


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor, scale: float,
          softcap: float | None) -> tuple[Tensor, Tensor]:
    """(log-probs of the targets, log of the sum over the vocabulary of p²) by the textbook."""
    logits = head(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = logits.softmax(-1)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets], p.square().sum(-1).log()


def example(bias: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=torch.float64)
    hidden = (3 * torch.randn(TOKENS, HIDDEN, dtype=torch.float64)).requires_grad_()
    return hidden, head, torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 4, VOCABULARY, 1024])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 1.5)])
def test_the_head_in_blocks_equals_a_plain_log_softmax_with_its_gradients(
        columns: int, bias: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_blocks, "AT_ONCE", {"cpu": columns * TOKENS})
    monkeypatch.setattr(logit_blocks, "COLUMNS", 1)
    hidden, head, targets, upstream = example(bias)
    inputs = [hidden, *head.parameters()]
    expected, expected_collision = plain(hidden, head, targets, scale, softcap)
    expected_gradients = torch.autograd.grad(expected @ upstream, inputs)

    values, collision = LogpHead(head, scale, softcap)(hidden, targets, collision=True)
    gradients = torch.autograd.grad(values @ upstream, inputs)

    close: Any = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(values, expected, **close)
    torch.testing.assert_close(collision, expected_collision, **close)
    torch.testing.assert_close(gradients, expected_gradients, **close)


def test_collision_has_no_gradient_and_is_empty_unless_asked_for() -> None:
    hidden, head, targets, _ = example(bias=False)
    assert not LogpHead(head)(hidden, targets, collision=True)[1].requires_grad
    assert LogpHead(head)(hidden, targets)[1].numel() == 0


def test_low_precision_weights_still_give_fp32_log_probs() -> None:
    hidden, head, targets, upstream = example(bias=True)
    low = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.bfloat16)
    low.load_state_dict({k: v.bfloat16() for k, v in head.state_dict().items()})
    start = hidden.detach().bfloat16().requires_grad_()
    values, _ = LogpHead(low)(start, targets)
    assert values.dtype == torch.float32
    logits = low(start).float()
    torch.testing.assert_close(values, logits.log_softmax(-1)[torch.arange(TOKENS), targets], rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(values @ upstream.float(), [start, low.weight, low.bias])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do() -> None:
    hidden, head, targets, upstream = example(bias=True)
    expected = torch.autograd.grad(plain(hidden, head, targets, 1.0, None)[0] @ upstream, hidden)[0]
    head.requires_grad_(False)
    (LogpHead(head)(hidden, targets)[0] @ upstream).backward()
    assert head.weight.grad is None and head.bias.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)


def test_without_targets_the_head_gives_plain_logits_from_the_same_parameters() -> None:
    hidden, head, _, _ = example(bias=True)
    wrapped = LogpHead(head)
    assert wrapped.weight is head.weight and set(wrapped.state_dict()) == set(head.state_dict())
    torch.testing.assert_close(wrapped(hidden), head(hidden), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_blocks_kept_from_forward_give_the_gradients_of_blocks_computed_again(kept: int) -> None:
    hidden, head, targets, upstream = example(bias=True)
    inputs = [hidden, *head.parameters()]
    expected = torch.autograd.grad(plain(hidden, head, targets, 1.0, None)[0] @ upstream, inputs)
    values, _ = BlockwiseLogps.apply(hidden, head.weight, head.bias, targets, 1.0, None, False, True,
                                     Blocks(VOCABULARY, 4, kept), PLAIN)
    torch.testing.assert_close(torch.autograd.grad(values @ upstream, inputs), expected, rtol=0, atol=1e-12)


def test_a_pack_without_completion_tokens_has_no_log_probs() -> None:
    _, head, _, _ = example(bias=False)
    empty = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    values, _ = LogpHead(head)(empty, torch.zeros(0, dtype=torch.int64))
    assert values.shape == (0,)
    values.sum().backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


@pytest.mark.parametrize(("rows", "vocabulary", "bytes_each", "device", "wanted"), [
    (14_336, 151_936, 2, "cuda", Blocks(151_936, 9_216, 1)),              # 4.4 GB: more than is kept
    (14_336, 128_256, 2, "cuda", Blocks(128_256, 9_216, 14)),             # 3.7 GB: no product is done twice
    (512, 151_936, 2, "cuda", Blocks(151_936, 262_144, 1)),               # all in one block
    (400, 4_096, 4, "cpu", Blocks(4_096, 41_728, 1)),
    (4_096, 131_072, 4, "cpu", Blocks(131_072, 4_096, 1)),
    (10**6, 512, 4, "cpu", Blocks(512, 256, 1)),                          # never narrower than a product is worth
    (0, 512, 4, "cpu", Blocks(512, 2**24, 1))])
def test_blocks_are_whole_tiles_wide_and_kept_where_they_are_small(
        rows: int, vocabulary: int, bytes_each: int, device: str, wanted: Blocks):
    blocks = plan_blocks(rows, vocabulary, bytes_each, device)
    assert blocks == wanted and blocks.width % 256 == 0
    assert [at for first, end in blocks.spans
            for at in range(first, end)] == list(range(vocabulary)), "every column once, in order"


def test_kernels_are_tried_before_they_are_used_and_wrong_ones_are_found_out() -> None:
    mine = torch.device("cpu")
    assert trial(PLAIN, mine, torch.bfloat16) == 0

    def forgets_the_target(*inputs: Any) -> Tensor:
        return PLAIN.differentiate(*inputs[:2], inputs[2] + 1, *inputs[3:])

    def doubles_the_normalizer(*inputs: Any) -> None:
        PLAIN.absorb(*inputs)
        inputs[4].add_(0.5)

    def gives_no_number(*inputs: Any) -> Tensor:
        return PLAIN.differentiate(*inputs) * torch.nan

    assert not trial(Passes(PLAIN.absorb, gives_no_number), mine, torch.bfloat16) < TRIAL_ERROR, "NaN is not small"
    assert trial(Passes(PLAIN.absorb, forgets_the_target), mine, torch.bfloat16) > TRIAL_ERROR
    assert trial(Passes(doubles_the_normalizer, PLAIN.differentiate), mine, torch.bfloat16) > TRIAL_ERROR
    if not torch.cuda.is_available():
        assert "Error" in str(kernels_misfit(torch.device("cuda",
                                                          0))), "there is no GPU, or no Triton: the reason is told"
