"""What an audit says: a Finding of one of KINDS, with its meaning for training and what to do about it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
EXAMPLES = 50                                # places that a finding names


@dataclass(frozen=True)
class Kind:
    severity: Severity                       # unless the numbers say otherwise
    meaning: str                             # for training
    remedy: str                              # with the key to turn


KINDS: dict[str, Kind] = {
    "duplicate_pair": Kind(
        "warning", "The same prompt with the same two answers stands there several times: its judgment weighs more "
        "than others, and an epoch is more than one pass over it.",
        "remove the repeated rows, or give them a smaller weight (column `weight`)"),
    "near_duplicate_prompt": Kind(
        "warning", "Prompts that differ in a word, in case or in punctuation, or of which one goes on where the other "
        "ends: training sees one question several times, and a split by prompt may put one of them on either side.",
        "keep one of each, or data.train[].rows to take fewer; hold out by a file of your own (data.eval) in place of "
        "data.eval_fraction"),
    "contradiction": Kind(
        "warning", "The same two answers to the same prompt, judged both ways: the gradients of the two pairs cancel.",
        "let a majority decide, remove both, or allow for such noise with loss.label_smoothing=0.1 (loss=robust)"),
    "preference_cycle": Kind(
        "warning", "Judgments of one prompt that run in a circle (a over b, b over c, c over a): no reward agrees with "
        "all of them.",
        "remove the weakest judgment of each circle, or use ratings, which cannot run in a circle (format: ratings)"),
    "tie": Kind(
        "warning", "Neither answer was found better. Left out, such a judgment teaches nothing; trained on as a pair, "
        "it teaches a difference that nobody saw.",
        "leave such rows out, or data.ties=keep with a loss that knows ties"),
    "both_bad": Kind(
        "warning", "Both answers were found bad: whichever is called chosen, training makes it likelier.",
        "leave such rows out, or data.ties=keep with a loss that knows ties; better answers help most"),
    "identical_completions": Kind(
        "warning", "Chosen and rejected are the same text, up to case and white space: there is nothing to prefer.",
        "remove the rows, or data.on_bad_row=skip to leave out those that are the same to the letter"),
    "length_bias": Kind(
        "warning", "Length alone tells chosen from rejected: the policy learns to write longer (or shorter) answers "
        "whatever they say.",
        "loss=sigmoid_norm, or loss.ld_alpha=0.5, or rows balanced by length; read the length-controlled accuracy"),
    "style_bias": Kind(
        "warning", "Markup, openings or refusals alone tell chosen from rejected (length is allowed for): the policy "
        "learns the style, not what was judged.",
        "balance the rows whose features have the largest weights in `details`, or rewrite answers in one style"),
    "position_bias": Kind(
        "warning", "The answer that was shown in one place wins more often than chance: the judge went by the place.",
        "judge again with the answers in the other order, and keep pairs on which both orders agree"),
    "leakage": Kind(
        "error", "Prompts that are held out, or of a benchmark, are trained on: results on them say nothing of new "
        "prompts.",
        "remove these rows from data.train (or from data.eval); hold out by prompt with data.eval_fraction"),
    "truncation_loss": Kind(
        "warning", "Pairs are longer than data.max_length: they are dropped, or lose the end of an answer or of the "
        "prompt.",
        "raise data.max_length, or choose what is lost with data.truncation=drop, keep_start or keep_end"),
    "template_fault": Kind(
        "error", "Tokens that the model never sees at generation: a beginning or an end twice, an answer without an "
        "end of turn, or a prompt that is not what generation feeds.",
        "mend data.chat_template or the rows (data.chat_template=none for texts that are rendered already); look at "
        "them with dpo-dist show"),
    "special_tokens_in_text": Kind(
        "warning", "A text holds a control token of a chat template: tokenized, it ends a turn or begins one in the "
        "middle of what somebody says.",
        "remove the token from the text, or give the conversation as turns (format: messages)"),
    "language_mix": Kind(
        "warning", "Prompt and answers, or the two answers, are in different languages, or a few rows are in another "
        "language than all others.",
        "remove the rows, or name them as a data set of their own (data.train[].name), which is then told apart"),
    "source_imbalance": Kind(
        "warning", "One data set outweighs another many times over: the small one has hardly a say.",
        "data.train[].weight for the small one, data.train[].rows for the large one"),
    "annotator_disagreement": Kind(
        "warning", "The annotators of these pairs did not agree: the label is a vote that might have gone the other "
        "way.",
        "leave out the closest votes, give them a smaller weight (column `weight`), or loss.label_smoothing=0.1"),
    "too_easy": Kind(
        "warning", "The reference finds the rejected answer far less likely than the chosen one, token for token: "
        "often it is broken text, and there is little to learn from it.",
        "look at the rejected answers, and draw them from the model that is trained"),
    "hopeless": Kind(
        "warning", "The reference finds the chosen answer far less likely than the rejected one, token for token: "
        "often it is broken or swapped, and training can only push it a little.",
        "look at these rows: is the label flipped, the answer cut or in another language?"),
    "empty_reasoning": Kind(
        "warning", "An answer has a block of reasoning with nothing in it: the policy learns to skip its reasoning.",
        "remove the empty block or the row; for answers without reasoning data.chat_template_kwargs="
        "{enable_thinking: false}"),
}


@dataclass(frozen=True)
class Finding:
    kind: str
    severity: Severity
    count: int                               # pairs (for a tie: judgments) that it concerns
    share: float                             # of those that were looked at
    examples: list[str]                      # where they stand, the first or the worst first
    meaning: str
    remedy: str
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        plain = asdict(self)
        if not self.details:
            del plain["details"]
        return plain


def finding(kind: str, count: int, of: int, examples: Sequence[str], severity: Severity | None = None,
            **details: Any) -> Finding:
    """A finding of a known kind; `of`: how many were looked at."""
    known = KINDS[kind]
    return Finding(kind, severity or known.severity, int(count), round(count / of, 6) if of else 0.0,
                   list(examples[:EXAMPLES]), known.meaning, known.remedy, details)


def reaches(severity: Severity, bound: str) -> bool:
    """Whether a finding of this severity ends a run under audit.fail_on=bound."""
    return bound != "none" and SEVERITIES.index(severity) >= [*SEVERITIES].index(bound)  # type: ignore[arg-type]
