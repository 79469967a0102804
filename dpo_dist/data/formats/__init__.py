"""The data formats: one reader each, and the table FORMATS. A reader goes from a record's fields to its pairs; what
does not fit raises Unfit.

Every format may also carry `weight` (> 0, the pair's weight in the loss), `confidence` (above 0, at most 1, times which
the weight counts), `strength` or `margin` (how much better chosen is, in the data's own unit), `system`, `tools`,
`chat_template_kwargs`, and what judgment.py lists. Rows that name chosen and rejected may say that they are a tie
(ties.py). Columns that a format does not read are kept with the pair (free.py).
"""
from __future__ import annotations

from dpo_dist.data.fields import Fields
from dpo_dist.data.formats.arena import arena
from dpo_dist.data.formats.argilla import READS, argilla, is_argilla
from dpo_dist.data.formats.format import DataRow, Format, NoPair, Outcome, Tie
from dpo_dist.data.formats.helpsteer import helpsteer
from dpo_dist.data.formats.kto import is_kto, kto, paired
from dpo_dist.data.formats.pairs import hh, messages, preference, sharegpt, token_ids
from dpo_dist.data.formats.rated import distilabel, nemo_rl, ratings, ultrafeedback
from dpo_dist.data.formats.trainers import alpaca, axolotl, openai, swift

__all__ = ["FORMATS", "DataRow", "Format", "NoPair", "Outcome", "Tie"]


# names that formats read; free.py keeps the others
PAIR = "prompt|messages|chosen|rejected"
ASKED = "instruction|input|query|question|history"


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
                      is_argilla, READS),
    "preference": Format(preference, "prompt, chosen, rejected (texts)",
                         lambda f: _texts(f, "prompt", "chosen", "rejected"), PAIR, may_say_tie=True),
    "messages": Format(messages, "chosen, rejected (lists of {role, content}), and prompt unless they begin with it",
                       lambda f: _has(f, "chosen", "rejected") and any(isinstance(f.get(key), list | dict) for key in (
                           "prompt", "messages", "chosen", "rejected")), PAIR, may_say_tie=True),
    "sharegpt": Format(sharegpt, "conversations, chosen, rejected ({from, value})",
                       lambda f: _has(f, "conversations", "chosen", "rejected"), "conversations|chosen|rejected",
                       may_say_tie=True),
    "hh": Format(hh, "chosen, rejected (transcripts 'Human: ... Assistant: ...')",
                 lambda f: "prompt" not in f and all(isinstance(f.get(k), str) and f[k].lstrip().startswith("Human:")
                                                     for k in ("chosen", "rejected")), "chosen|rejected",
                 may_say_tie=True),
    "openai": Format(openai, "input {messages, tools}, preferred_output, non_preferred_output",
                     lambda f: _has(f, "input", "preferred_output", "non_preferred_output"),
                     "input|(non_)?preferred_output", may_say_tie=True),
    "swift": Format(swift, "messages and rejected_response, or messages and rejected_messages",
                    lambda f: _any(f, "rejected_response", "rejected_messages")
                    and _any(f, "messages", "response", "output"),
                    f"{ASKED}|messages|response|output|rejected_response|rejected_messages", may_say_tie=True),
    "alpaca": Format(alpaca, "instruction, chosen, rejected; input, system, history",
                     lambda f: _has(f, "instruction", "chosen", "rejected"), f"{ASKED}|chosen|rejected",
                     may_say_tie=True),
    "axolotl": Format(axolotl, "instruction or question, chosen_response, rejected_response (or chosen, rejected)",
                      lambda f: _any(f, "instruction", "question", "prompt", "input")
                      and (_has(f, "chosen_response", "rejected_response") or _has(f, "chosen", "rejected")),
                      f"{ASKED}|prompt|(chosen|rejected)(_response)?", may_say_tie=True),
    "helpsteer": Format(helpsteer, "context, response1, response2, overall_preference",
                        lambda f: _any(f, "overall_preference", "preference_strength")
                        and _any(f, "response1", "response_1"),
                        "context|prompt|response_?[12]([_.-].*)?|overall_preference|preference_strength|"
                        "individual_preference|domain|language"),
    "nemo_rl": Format(nemo_rl, "context, completions of {rank, completion}",
                      lambda f: "context" in f and _objects(f, "completions", "completion"), "context|completions"),
    "distilabel": Format(distilabel, "instruction (or messages), generations, ratings",
                         lambda f: isinstance(f.get("generations"), list) and "ratings" in f,
                         f"{PAIR}|instruction|conversation|generations|generation_models|ratings"),
    "ultrafeedback": Format(ultrafeedback, "instruction, completions of {response, overall_score}",
                            lambda f: "instruction" in f and _objects(f, "completions", "response"),
                            f"{PAIR}|instruction|completions"),
    "arena": Format(arena, "conversation_a, conversation_b (or prompt, response_a, response_b), winner",
                    lambda f: _any(f, "winner", "winner_model_a")
                    and (_has(f, "conversation_a", "conversation_b") or _has(f, "prompt", "response_a", "response_b")),
                    "prompt|(conversation|response|model)_[ab]|winner(_model_[ab]|_tie)?"),
    "ratings": Format(ratings, "prompt, responses, ratings (or responses of {text, rating})",
                      lambda f: isinstance(f.get("responses", f.get("completions")), list),
                      "prompt|instruction|responses|completions|ratings|scores|models|generators|generation_models|"
                      "versions"),
    "token_ids": Format(token_ids, "prompt_ids, chosen_ids, rejected_ids (lists of whole numbers)",
                        lambda f: _has(f, "prompt_ids", "chosen_ids", "rejected_ids"),
                        "(prompt|chosen|rejected)_ids|(chosen|rejected)_counts", may_say_tie=True),
    "kto": Format(kto, "prompt, completion, label (true or false), of each prompt one of both", is_kto,
                  "prompt|chosen|rejected|completion", group=paired),
}
