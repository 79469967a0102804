"""What the run shows: the figures before and after DPO, and a few answers."""
from __future__ import annotations

import math
import statistics
from typing import Any

from dpo_dist.real.answers import Answer
from dpo_dist.real.rules import RULES, rating

CHAT = "What is the capital of France?"             # what the exported model is asked at the end
Answers = dict[str, list[Answer]]


def measured(before: Answers, after: Answers, neutral: list[float], divergence: dict[str, float],
             eval_before: dict[str, Any], eval_after: dict[str, Any]) -> dict[str, Any]:
    """Everything of the result that stands in the table."""
    rewards = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "loss": "loss"}
    return {**{when: of_answers(answers) | {"neutral_nats": round(nats, 4)} | {
                   name: round(row[key], 4) for name, key in rewards.items()}
               for when, answers, nats, row in (("before", before, neutral[0], eval_before),
                                                ("after", after, neutral[1], eval_after))},
            "kl": divergence}


def of_answers(answers: Answers) -> dict[str, Any]:
    flat = [answer for given in answers.values() for answer in given]

    def mean(values: Any) -> float:
        return round(statistics.mean(values), 4)

    return {"answers": len(flat), "rules": {name: mean(rule(a) for a in flat) for name, rule in RULES.items()},
            "all rules": mean(rating(a) == len(RULES) for a in flat), "rules obeyed": mean(rating(a) for a in flat),
            "ended": mean(a.ended for a in flat), "tokens": mean(len(a.ids) for a in flat),
            "words": mean(len(a.text.split()) for a in flat),
            "different words": mean(len({*a.text.lower().split()}) / max(1, len(a.text.split())) for a in flat)}


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The table's lines: what it is, before, after."""
    def both(label: str, show: Any) -> list[str]:
        return [label, show(result["before"]), show(result["after"])]

    kl, rules = result["kl"], result["before"]["rules"]
    return [
        *(both(f"answers: {name}", lambda found, name=name: f"{found['rules'][name]:.1%}") for name in rules),
        both(f"answers that obey all {len(rules)} rules", lambda found: f"{found['all rules']:.1%}"),
        both(f"rules that an answer obeys, of {len(rules)}", lambda found: f"{found['rules obeyed']:.2f}"),
        both("answers that ended by themselves", lambda found: f"{found['ended']:.1%}"),
        both("words an answer, tokens an answer", lambda found: f"{found['words']:.1f}, {found['tokens']:.1f}"),
        both("share of an answer's words that differ", lambda found: f"{found['different words']:.2f}"),
        both("a neutral text: nats a token, perplexity",
             lambda found: f"{found['neutral_nats']:.4f}, {math.exp(found['neutral_nats']):.2f}"),
        ["KL(policy || reference) in nats: an answer, a token", "0",
         f"{kl['an_answer']:.2f} ± {kl['an_answer_error']:.2f}, {kl['a_token']:.4f}"],
        both("held-out pairs: reward accuracy", lambda found: f"{found['accuracy']:.3f}"),
        both("held-out pairs: reward margin", lambda found: f"{found['margin']:.3f}"),
        both("held-out pairs: loss", lambda found: f"{found['loss']:.4f}"),
    ]


def three_pairs(before: Answers, after: Answers) -> list[dict[str, str]]:
    """The first answers, before and after, to three prompts that are spread evenly over all: nobody chose them."""
    prompts = list(before)
    chosen = [prompts[(2 * i + 1) * len(prompts) // 6] for i in range(3)]
    return [{"prompt": prompt, "before": shown(before[prompt][0]), "after": shown(after[prompt][0])}
            for prompt in chosen]


def shown(answer: Answer) -> str:
    """The answer's text; three dots where the sampling cut it off."""
    return answer.text if answer.ended else f"{answer.text} …"
