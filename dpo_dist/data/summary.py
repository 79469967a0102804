"""What became of the data, for a person: a few lines from a store's own report."""
from __future__ import annotations

from typing import Any

import numpy as np

from dpo_dist.data.store import PairStore


def summary_lines(store: PairStore, title: str) -> list[str]:
    """Line by line: rows read, left out and cut, and the lengths of the pairs that remain. `title`: train or eval."""
    report = store.report
    lines = [f"{title}: {len(store):,} pairs, {store.meta['tokens']:,} tokens"]
    for source in report["sources"]:
        lines += _source_lines(source["read"], source["tokens"])
    if len(store):
        lines += _length_lines(store)
        lines.append(f"  repeated: {report['duplicate_pairs']:,} pairs (kept), {report['duplicate_prompts']:,} prompts")
    if report["pairs_with_training_prompts"]:
        lines.append(f"  WARNING: {report['pairs_with_training_prompts']:,} of these pairs have a prompt that is "
                     "trained on")
    if report["template_asks_for_date"] and len(store):
        lines.append("  the chat template asks for today's date and always gets 26 July 2024: tokens must not depend "
                     "on the day")
    return lines


def _source_lines(read: dict[str, Any], tokens: dict[str, Any]) -> list[str]:
    ties = ""
    if read["ties"]:
        both_bad = f" ({read['both_bad']:,} both bad)" if read["both_bad"] else ""
        ties = f", {read['ties']:,} ties{both_bad}{' kept' if read['kept_ties'] else ' left out'}"
    cut = f" ({tokens['truncated']:,} truncated)" if tokens["truncated"] else ""
    lines = [f"  {read['source']} ({read['format']}): {read['rows']:,} rows read, {tokens['kept']:,} pairs "
             f"kept{cut}{ties}"]
    lines += [f"    without a pair: {count:,} × {reason}" for reason, count in read["no_pair"].items()]
    for verb, tally in (("bad", read["bad"]), ("dropped", tokens["dropped"]), ("WARNING, kept", tokens["left_out"])):
        for reason, count in sorted(tally["counts"].items(), key=lambda item: -item[1]):
            lines.append(f"    {verb}: {count:,} × {reason}, e.g. {tally['examples'][reason][0]}")
    return lines


def _length_lines(store: PairStore) -> list[str]:
    lengths = store.lengths()
    cells = [f"{name} {int(np.median(column)):,} / {int(np.percentile(column, 95)):,} / {int(column.max()):,}"
             for name, column in zip(("prompt", "chosen", "rejected"), lengths.T, strict=True)]
    longer = float((lengths[:, 1] > lengths[:, 2]).mean())
    lines = [f"  tokens (median / p95 / max): {', '.join(cells)}",
             f"  chosen is longer than rejected in {longer:.0%} of the pairs"]
    counted, whole = int(store.counted().sum()), int(lengths[:, 1:].sum())
    if counted < whole:
        lines.append(f"  {counted / whole:.1%} of the completions' tokens count; the others are context")
    return lines
