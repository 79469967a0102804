"""README's tables of the audit's time, planted flips, guards, and preferences whose truth is known."""
from __future__ import annotations

import statistics
from typing import Any


def data_table(audit: dict[str, Any]) -> str:
    """What an audit of many rows took: a line for each set."""
    lines = [f"| {sizes['tokens_a_pair']} | {sizes['megabytes']:,} | {sizes['seconds']:.0f} | "
             f"{sizes['processor_seconds']:.0f} | {sizes['peak_mib']:,} |" for sizes in audit["sets"].values()]
    return "\n".join([f"An audit of {audit['rows']:,} rows on {audit['cores']} cores:", "",
                      "| tokens a pair | megabytes | seconds | seconds of the processor | peak of all processes, MiB |",
                      "|---|---|---|---|---|", *lines])


def result_table(flips: dict[str, Any], guards: dict[str, Any], frontier: dict[str, Any]) -> str:
    """What was planted, and what of it was found."""
    population = [point for point in frontier["points"]
                  if point["data"] == "population" and point["loss"] == "sigmoid"]
    betas = [point["beta"] for point in population]
    worst = max(point["total_variation"] for point in population)
    return "\n".join([
        *_flip_lines(flips), "", *_guard_lines(guards), "",
        "On a policy small enough to know its optimum `pi_ref · exp(r / beta) / Z`, DPO reaches it for "
        f"{len(betas)} betas from {min(betas):g} to {max(betas):g}: "
        f"total variation {worst:.1g} at most (`results/frontier.json`, `docs/records.md`)."])


def _flip_lines(flips: dict[str, Any]) -> list[str]:
    lines = []
    for name, settings in flips.items():
        for setting, runs in settings.items():
            found = [run["in_first_tenth"] for run in runs]
            spread = f"{min(found):.0%} to {max(found):.0%}" if len(found) > 1 else "-"
            lines.append(f"| {name} | {setting} | {runs[0]['flipped']} of {runs[0]['pairs']} | {len(runs)} | "
                         f"{statistics.median(found):.0%} | {spread} |")
    return ["Labels flipped at random, and how many of them are in the first tenth of the suspects (chance: 10%):", "",
            "| set | run | flipped | trials | median | from, to |", "|---|---|---|---|---|---|", *lines]


def _guard_lines(guards: dict[str, Any]) -> list[str]:
    lines = []
    for name, run in guards["runs"].items():
        warned = run.get("warned")
        told = f"{warned['step']} | {warned['fall']:.2f}, {warned['share_of_the_fall']:.0%}" if warned else "none | -"
        lines.append(f"| {name} | {max(0.0, run['largest_fall']):.2f} | {told} |")
    return [f"The guard on falling chosen answers, the demo's model, {guards['steps']} steps:", "",
            "| run | largest fall, nats a token | step of the warning | fall by then |", "|---|---|---|---|", *lines]
