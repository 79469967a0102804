"""DPO the way it is commonly written, to compare with: chosen and rejected rows concatenated and padded, the logits of every position whole,
a live reference. Nothing here is used by the project."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_dist.preference import TokenizedPair


def naive_gradients(model: Any, reference: Any, pairs: Sequence[TokenizedPair], pairs_at_once: int, beta: float, device: torch.device) -> float:
    """The mean DPO loss of the pairs (arXiv 2305.18290, eq. 7), its gradients added to the model's."""
    total = 0.0
    for at in range(0, len(pairs), pairs_at_once):
        part = pairs[at:at + pairs_at_once]
        rows = [(p.prompt_ids, p.chosen_ids) for p in part] + [(p.prompt_ids, p.rejected_ids) for p in part]
        chosen, rejected = summed_logps(model, rows, device).chunk(2)
        with torch.no_grad():
            reference_chosen, reference_rejected = summed_logps(reference, rows, device).chunk(2)
        margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
        loss = -F.logsigmoid(margins).sum() / len(pairs)
        loss.backward()
        total += loss.item()
    return total


def summed_logps(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> Tensor:
    """(R,) the completions' log-probs, nats, from the logits of all positions."""
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    at = torch.arange(padded.shape[1])[None]
    prompts, lengths = torch.tensor([[len(p)] for p, _ in rows]), torch.tensor([[len(i)] for i in ids])
    is_completion = ((at >= prompts) & (at < lengths)).to(device)
    padded, real = padded.to(device), (at < lengths).to(device)
    logits = model(input_ids=padded, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, padded[:, 1:, None])[..., 0]
    return (logps * is_completion[:, 1:]).sum(1)
