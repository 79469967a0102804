"""What held-out metrics runs and checkpoints can be chosen by, and in which direction. No torch here."""
from __future__ import annotations

# The scale of `loss` depends on beta: not for comparing runs of several betas.
OBJECTIVES = {"rewards/accuracies": "maximize", "rewards/margins": "maximize", "loss": "minimize"}


def badness(objective: str, value: float) -> float:
    """The smaller, the better the value; what is not a number is the worst."""
    signed = value if OBJECTIVES[objective] == "minimize" else -value
    return signed if signed == signed else float("inf")
