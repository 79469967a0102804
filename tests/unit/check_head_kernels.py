"""The head through Triton's kernels against torch's own operations, in Triton's interpreter on the CPU; run by
test_head_kernels.py."""
from __future__ import annotations

import itertools

import torch
from torch import nn

from dpo_dist.models.head import PLAIN, TRIAL_ERROR, BlockwiseLogps, Passes, trial, triton_passes
from dpo_dist.sizing.logit_blocks import Blocks

TRITON = triton_passes()


def run(passes: Passes, hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, upstream: torch.Tensor,
        blocks: Blocks, scale: float, softcap: float | None) -> list[torch.Tensor]:
    values, collision = BlockwiseLogps.apply(hidden, head.weight, head.bias, targets, scale, softcap, True, True,
                                             blocks, passes)
    return [values, collision, *torch.autograd.grad(values @ upstream, [hidden, head.weight, head.bias])]


def main() -> None:
    torch.manual_seed(0)
    for dtype, (scale, softcap), width, rows in itertools.product(
            (torch.float32, torch.bfloat16), ((1.0, None), (0.5, 1.5)), (256, 2304, 8192), (1, 7)):
        vocabulary = 5003                                  # no multiple of anything: the last block is ragged
        head = nn.Linear(16, vocabulary, dtype=dtype)
        nn.init.normal_(head.weight, std=1.0)
        hidden = (2 * torch.randn(rows, 16)).to(dtype).requires_grad_()
        targets, upstream = torch.randint(vocabulary, (rows,)), torch.randn(rows)
        blocks = Blocks(vocabulary, width, 2)
        ours, wanted = (run(passes, hidden, head, targets, upstream, blocks, scale, softcap)
                        for passes in (TRITON, PLAIN))
        for name, a, b in zip(("logps", "collision", "hidden", "weight", "bias"), ours, wanted, strict=True):
            bound = 1e-5 if dtype == torch.float32 or name in ("logps", "collision") else 1e-2
            error = ((a - b).float().norm() / b.float().norm()).item()
            assert error < bound, (
                f"{name} differs by {error:.2g}: {dtype}, scale {scale}, cap {softcap}, width {width}, rows {rows}")
    assert trial(TRITON, torch.device("cpu"), torch.bfloat16) < TRIAL_ERROR
    print("the kernels agree")


if __name__ == "__main__":
    main()
