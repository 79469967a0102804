"""Writes the tables of large_models.md, by dpo_dist.sizing.estimate: python docs/large_models.py."""
from __future__ import annotations

from pathlib import Path

from dpo_dist.config.compose import compose
from dpo_dist.sizing.estimate import memory, scoring_memory
from dpo_dist.sizing.hardware import GPU_80GB, Hardware
from dpo_dist.sizing.lengths import Lengths
from dpo_dist.sizing.report import smallest_change
from dpo_dist.sizing.shape import read_shape
from dpo_dist.sizing.step_time import scoring_seconds, step_time

HERE = Path(__file__).resolve().parent
LENGTHS = Lengths(prompt=512, chosen=512, rejected=512, pairs=60_000, source="assumed")
OVERRIDES = ["reference=zero", "train.pairs_per_step=512", "train.tokens_per_microbatch=16384",
             "model.gradient_checkpointing=true"]
COLUMNS = ("nodes", "set besides the above", "policy: GB a GPU (and of host)", "step: s", "of it computing",
           "communication", "GiB sent", "scoring: GB a GPU", "s")


def table(name: str) -> str:
    """The rows of one model, for 8 to 64 nodes of 8 GPUs."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for nodes in (8, 16, 32, 64):
        config = compose([f"model.path={HERE / 'shapes' / name}", *OVERRIDES])
        shape, world = read_shape(HERE / "shapes" / name), Hardware(nodes, 8 * nodes, GPU_80GB)
        change = smallest_change(config, shape, LENGTHS, world)
        if change is None or change.nodes > nodes:
            lines.append(f"| {nodes} | does not fit" + " |" * (len(COLUMNS) - 1))
            continue
        need, time = memory(change.config, shape, LENGTHS, world), step_time(change.config, shape, LENGTHS, world)
        host = f" ({need.host / 1e9:.0f})" if need.host else ""
        lines.append(
            f"| {nodes} | {' '.join(change.words) or '-'} | {need.peak / 1e9:.0f}{host} | {time.seconds:.0f} | "
            f"{time.compute:.0f} | {time.communication:.0f} | {time.sent / 2**30:,.0f} | "
            f"{scoring_memory(config, shape, LENGTHS, world) / 1e9:.0f} | "
            f"{scoring_seconds(config, shape, LENGTHS, world):.0f} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The document with its tables as they are predicted now."""
    for name in ("llama-3.1-70b", "llama-3.1-405b"):
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table(name)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


if __name__ == "__main__":
    document = HERE / "large_models.md"
    document.write_text(filled(document.read_text()))
