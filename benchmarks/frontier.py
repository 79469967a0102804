"""The reward that a policy reaches at each distance from its reference, over beta, beside what the closed form says:
python benchmarks/frontier.py [--out FILE] [--page FILE.html].

A tabular policy (toy_policy.py: 24 prompts of 8 answers) is trained with DPO on Bradley-Terry preferences. `population`
learns from the probabilities themselves, also with 20 % of the labels flipped, where robust DPO knows the rate; the
others from 10 or 100 judgments of every pair. Of every policy: KL to the reference (nats), expected reward, the largest
total variation from pi_ref · exp(r / beta) / Z, and `below`: how much more reward the closed form has at the same KL.
Results go to benchmarks/results/frontier.json, and with --page into a page with the report's own plot; some seconds on
one core.
"""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy_policy import Toy, bradley_terry, fitted, flipped, sampled, total_variation

from dpo_dist.config.schema import LossConfig
from dpo_dist.report.figures import grid
from dpo_dist.report.frontier import Point, frontier_figure
from dpo_dist.report.page import Section, page

RESULTS = Path(__file__).parent / "results" / "frontier.json"
BETAS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
FLIPPED = 0.2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--answers", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)                 # threads cost more than so few numbers do
    results = frontier(Toy.drawn(arguments.prompts, arguments.answers, seed=0), arguments.betas)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.page:
        arguments.page.write_text(drawn(results))
    for row in results["points"]:
        print(f"{row['data']:22} beta {row['beta']:<5g} KL {row['kl']:7.4f}  reward {row['reward']:.4f}  "
              f"below the frontier {row['below']:.2g}  total variation {row['total_variation']:.2g}")


def frontier(toy: Toy, betas: list[float]) -> dict[str, Any]:
    """The results: `closed_form`, a fine curve, and `points`, the trained policies."""
    truth = bradley_terry(toy.difference)
    noisy = flipped(truth, FLIPPED)
    data: dict[str, tuple[Tensor, str, dict[str, float]]] = {
        "population": (truth, "sigmoid", {}), "10 a pair": (sampled(truth, 10, seed=1), "sigmoid", {}),
        "100 a pair": (sampled(truth, 100, seed=1), "sigmoid", {}),
        "flipped": (noisy, "sigmoid", {}), "flipped, robust": (noisy, "robust", {"label_smoothing": FLIPPED})}
    points = []
    for name, (judgments, loss, options) in data.items():
        for beta in betas:
            policy = fitted(toy, judgments, LossConfig(loss, beta=beta, **options))              # type: ignore[arg-type]
            points.append({"data": name, "loss": loss, "beta": beta, **figures(toy, policy),
                           "total_variation": float(total_variation(policy, toy.optimum(beta)).max())})
    curve = [{"beta": beta, **figures(toy, toy.optimum(beta))} for beta in fine(min(betas), max(betas))]
    return {"prompts": toy.reward.shape[0], "answers": toy.reward.shape[1], "closed_form": curve, "points": points}


def drawn(results: dict[str, Any]) -> str:
    """A page with the curve of the closed form and the points of the trained policies."""
    points = [Point("closed form", "closed form", f"closed form, beta {row['beta']:.3g}", row["kl"], row["reward"],
                    beta=row["beta"]) for row in results["closed_form"]]
    points += [Point(row["data"], row["data"], f"{row['data']}, beta {row['beta']:g}", row["kl"], row["reward"],
                     beta=row["beta"]) for row in results["points"]]
    text = ("No policy lies above the closed form's curve. DPO on the population's preferences lies on it, at "
            "each beta; few judgments and flipped labels cost reward.")
    figure = frontier_figure("frontier", "Reward over distance", text, points, "nats", "expected reward", joins=True)
    return page("A known truth", f"{results['prompts']} prompts of {results['answers']} answers",
                [Section("frontier", "The frontier", grid([figure]), [figure])])


def figures(toy: Toy, policy: Tensor) -> dict[str, float]:
    """KL and reward of a policy, and how far below the frontier it lies."""
    kl, reward = toy.kl(policy), toy.value(policy)
    return {"kl": kl, "reward": reward, "below": best_value(toy, kl) - reward}


def best_value(toy: Toy, kl: float) -> float:
    """The most reward at a mean KL of `kl`: the closed form's at the beta that has this KL, found by bisection."""
    low, high = 1e-3, 1e5                    # the KL falls with beta
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if toy.kl(toy.optimum(middle)) > kl else (low, middle)
    return toy.value(toy.optimum(high))


def fine(low: float, high: float, steps: int = 40) -> list[float]:
    """Betas at equal ratios."""
    return [low * (high / low) ** (step / steps) for step in range(steps + 1)]


if __name__ == "__main__":
    main()
