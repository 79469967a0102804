"""README's table of what a save costs (save_stall.py)."""
from __future__ import annotations

from typing import Any

VARIANTS = {"before": "before: DeepSpeed writes, training waits", "waits": "`train.save_in_background=false`",
            "now": "now: training waits for a copy"}


def save_table(found: dict[str, Any]) -> str:
    """A line for each way to save."""
    rows = [(text, found[name]) for name, text in VARIANTS.items()]
    return "\n".join([
        f"{found['model']}, {found['ranks']} ranks, ZeRO-3, fp32, {found['cpus']} CPU cores; medians, from "
        f"{found['rounds']} run{'s' * (found['rounds'] > 1)} each, in turn:", "",
        "| | training stands still, seconds | the step after it | other steps | checkpoint, GiB |",
        "|---|---|---|---|---|",
        *(f"| {text} | {row['stall_seconds']:.2f} | {row['step_after_a_save_seconds']:.2f} | "
          f"{row['other_steps_seconds']:.2f} | {row['checkpoint_gib']:.2f} |" for text, row in rows)])
