"""The data formats: one reader each, and the table FORMATS. A reader goes from a record's fields to its pairs; what
does not fit raises Unfit.

Every format may also carry `weight` (> 0, the pair's weight in the loss), `strength` or `margin` (how much better
chosen is, in the data's own unit), `system`, `tools`, `chat_template_kwargs` and `tags`; see judgment.py.
"""
from __future__ import annotations

from dpo_dist.data.fields import Fields
from dpo_dist.data.formats.argilla import argilla, is_argilla
from dpo_dist.data.formats.format import DataRow, Format, NoPair, Outcome
from dpo_dist.data.formats.helpsteer import helpsteer
from dpo_dist.data.formats.kto import is_kto, kto, paired
from dpo_dist.data.formats.pairs import hh, messages, preference, sharegpt, token_ids
from dpo_dist.data.formats.rated import distilabel, nemo_rl, ratings, ultrafeedback
from dpo_dist.data.formats.trainers import alpaca, axolotl, openai, swift

__all__ = ["FORMATS", "DataRow", "Format", "NoPair", "Outcome"]


def _has(fields: Fields, *keys: str) -> bool:
    return all(key in fields for key in keys)


def _any(fields: Fields, *keys: str) -> bool:
    return any(key in fields for key in keys)


def _texts(fields: Fields, *keys: str) -> bool:
    return all(isinstance(fields.get(key), str) for key in keys)


def _objects(fields: Fields, key: str, *names: str) -> bool:
    """Whether the field is a list of objects with at least one of these names."""
    held = fields.get(key)
    return isinstance(held, list) and bool(held) and all(isinstance(o, dict) and _any(o, *names) for o in held)


# In the order in which `auto` tries them: of those that a row fits, the first that can read it. So annotators' answers
# come before the names of the answers that they compare, and a pair before the ratings that it was made from.
FORMATS: dict[str, Format] = {
    "argilla": Format(argilla, "prompt, response_1, response_2 and annotators' answers, as in preference.responses",
                      is_argilla),
    "preference": Format(preference, "prompt, chosen, rejected (texts)",
                         lambda f: _texts(f, "prompt", "chosen", "rejected")),
    "messages": Format(messages, "chosen, rejected (lists of {role, content}), and prompt unless they begin with it",
                       lambda f: _has(f, "chosen", "rejected") and any(isinstance(f.get(key), list | dict) for key in (
                           "prompt", "messages", "chosen", "rejected"))),
    "sharegpt": Format(sharegpt, "conversations, chosen, rejected ({from, value})",
                       lambda f: _has(f, "conversations", "chosen", "rejected")),
    "hh": Format(hh, "chosen, rejected (transcripts 'Human: ... Assistant: ...')",
                 lambda f: "prompt" not in f and all(isinstance(f.get(k), str) and f[k].lstrip().startswith("Human:")
                                                     for k in ("chosen", "rejected"))),
    "openai": Format(openai, "input {messages, tools}, preferred_output, non_preferred_output",
                     lambda f: _has(f, "input", "preferred_output", "non_preferred_output")),
    "swift": Format(swift, "messages and rejected_response, or messages and rejected_messages",
                    lambda f: _any(f, "rejected_response", "rejected_messages")
                    and _any(f, "messages", "response", "output")),
    "alpaca": Format(alpaca, "instruction, chosen, rejected; input, system, history",
                     lambda f: _has(f, "instruction", "chosen", "rejected")),
    "axolotl": Format(axolotl, "instruction or question, chosen_response, rejected_response (or chosen, rejected)",
                      lambda f: _any(f, "instruction", "question", "prompt", "input")
                      and (_has(f, "chosen_response", "rejected_response") or _has(f, "chosen", "rejected"))),
    "helpsteer": Format(helpsteer, "context, response1, response2, overall_preference",
                        lambda f: _any(f, "overall_preference", "preference_strength")
                        and _any(f, "response1", "response_1")),
    "nemo_rl": Format(nemo_rl, "context, completions of {rank, completion}",
                      lambda f: "context" in f and _objects(f, "completions", "completion")),
    "distilabel": Format(distilabel, "instruction (or messages), generations, ratings",
                         lambda f: isinstance(f.get("generations"), list) and "ratings" in f),
    "ultrafeedback": Format(ultrafeedback, "instruction, completions of {response, overall_score}",
                            lambda f: "instruction" in f and _objects(f, "completions", "response")),
    "ratings": Format(ratings, "prompt, responses, ratings (or responses of {text, rating})",
                      lambda f: isinstance(f.get("responses", f.get("completions")), list)),
    "token_ids": Format(token_ids, "prompt_ids, chosen_ids, rejected_ids (lists of whole numbers)",
                        lambda f: _has(f, "prompt_ids", "chosen_ids", "rejected_ids")),
    "kto": Format(kto, "prompt, completion, label (true or false), of each prompt one of both", is_kto, group=paired),
}
