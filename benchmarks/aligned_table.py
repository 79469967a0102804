"""The table and the answers of `make real`, as its result.json has them."""
from __future__ import annotations

from typing import Any

from dpo_dist.real.report import CHAT, lines


def aligned_table(result: dict[str, Any]) -> str:
    steps = result["steps"].values()
    minutes, processor = (sum(step[name] for step in steps) / 60 for name in ("seconds", "processor_seconds"))
    return "\n".join([
        f"{result['pairs']['training']} training and {result['pairs']['held out']} held-out pairs, "
        f"{result['before']['answers']} sampled answers to held-out prompts. {minutes:.0f} minutes on "
        f"{result['cores']} CPU cores, in which the run had {processor:.0f} minutes of a core.", "",
        "| on topics that were never trained on | before | after |", "|---|---|---|",
        *(f"| {' | '.join(map(in_cell, line))} |" for line in lines(result)), "",
        "The first answers to three prompts at even distances; … where the sampling limit cut one off:", "",
        "| prompt | before | after |", "|---|---|---|",
        *(f"| {' | '.join(in_cell(pair[name]) for name in ('prompt', 'before', 'after'))} |"
          for pair in result["answers"]), "",
        f"The exported model in plain transformers, greedily: “{CHAT}” “{in_cell(result['chat'])}”"])


def in_cell(text: str) -> str:
    """The text as Markdown shows it in a cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("\n", "<br>")
