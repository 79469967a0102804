"""README's table of the fault campaign (`make faults`)."""
from __future__ import annotations

from typing import Any

COLUMNS = ("trials", "recovered", "stopped", "lost", "silent", "hung")


def faults_table(found: dict[str, Any]) -> str:
    """A line for each kind of fault, and one for all."""
    rows = [*found["kinds"].items(), ("**all**", found["total"])]
    trials, minutes = found["total"]["trials"], found["clock_seconds"] / 60
    return "\n".join([
        f"{trials} trials of {len(found['kinds'])} kinds (seed {found['seed']}) in {minutes:.0f} minutes:",
        "", "| fault | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS),
        *(f"| {kind.replace('_', ' ')} | " + " | ".join(str(counts[name]) for name in COLUMNS) + " |"
          for kind, counts in rows)])
