"""Of what trl_tokens.py found: the tables in README, and for each kind of difference who is right, and why."""
from __future__ import annotations

import re
from typing import Any

# (what a kind's name begins with, how the table calls it, who is right, why); judged by what inference feeds the model
# and where generation stops
VERDICTS = (
    (r"completion: TRL goes on after the end of turn",
     "after the end of turn TRL's completion goes on with what the template puts between turns: a line break, or "
     "`<\\|endoftext\\|>`", "ours",
     "Generation stops at the end of turn, so the model never emits what follows; TRL counts it in the loss."),
    (r"completion: ours ends it with '<\|user\|>', TRL not at all",
     "TRL's completion has no end, ours ends with `<\\|user\\|>`", "ours",
     "The template writes no end of turn; the model ends one with the next turn's token, at which generation stops by "
     "its `generation_config.json`. TRL's training template for the same model writes it too."),
    (r"prompt: TRL cuts|completion: TRL's begins with",
     "TRL's prompt lacks the line break after `<think>`, and its completion begins with it", "ours",
     "Inference feeds `<think>` and the line break, and the model goes on from there. TRL cuts where the tokens of "
     "prompt and conversation part, here within the token of two line breaks."),
    (r"prompt: the date", "the prompt's date: today's in TRL, always the same in ours", "both",
     "Each is what inference feeds on that day. In ours tokens, and the cache by their ids, stay the same."),
    (r"row: ours refuses: (the whole set|does not fit the chat template), TRL cuts .* off the prompt",
     "ours refuses the row; TRL's prompt lacks `<think>` or what follows it", "ours",
     "The generation prompt opens `<think>`; an answer without thinking is rendered without it, or closes it at once. "
     "TRL trains after a prompt that inference never feeds. Ours says how to mend it: a template of one's own, or, "
     "where the template has the switch, `data.chat_template_kwargs={enable_thinking: false}`."),
    (r"row: ours refuses: bad row: chosen is empty", "ours refuses the row: its chosen answer is empty", "ours",
     "TRL trains the model to say nothing; in ours `data.on_bad_row` decides."),
    (r"row: both refuse", "both refuse the row: the template takes no system turn", "both",
     "Ours names the row and can count it; TRL's run ends there."),
)
COLUMNS = ("template", "pairs that both take", "equal prompts", "equal completions", "prompts as inference feeds them",
           "completions that end where generation stops", "completions as generated, where known", "differences")


def tokens_tables(report: dict[str, Any]) -> str:
    """Two tables: what is equal under each template, and what differs."""
    found = _differences(report["templates"])
    letters = {kind: chr(ord("a") + n) for n, kind in enumerate(found)}
    lines = [f"All {sum(report['rows'].values()):,} rows of two real sets under {len(report['templates'])} templates "
             f"of TRL {report['trl']}'s wheel. Two numbers: TRL's, ours.", "", _line(*COLUMNS),
             "|---" * len(COLUMNS) + "|"]
    for template, sets in report["templates"].items():
        pairs = _sum(sets, "pairs")
        known = _sum(sets, "as_generated", "known")
        differs = [letters[name] for name, (_, _, _, templates) in found.items() if template in templates]
        lines.append(_line(
            template, f"{pairs:,}", f"{_sum(sets, 'equal_prompts'):,}",
            f"{_sum(sets, 'equal_completions'):,} of {2 * pairs:,}", _both(sets, "prompts_as_at_inference"),
            _both(sets, "ends_where_generation_stops"),
            f"{_both(sets, 'as_generated')} of {known:,}" if known else "-", ", ".join(differs) or "none"))
    heads = ("", "difference", "how many", "right", "why")
    lines += ["", _line(*heads), "|---" * len(heads) + "|"]
    for name, (right, why, counts, templates) in found.items():
        many = ", ".join(f"{count:,} {of}s" for of, count in counts.items())
        lines.append(_line(letters[name], name, f"{many}: {', '.join(templates)}", right, why))
    return "\n".join(lines)


def _differences(templates: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, int], list[str]]]:
    """{difference: (who is right, why, {"row", "prompt" or "completion": how many}, templates)}, as VERDICTS has them;
    a kind that none of them matches is named itself and not judged."""
    out: dict[str, tuple[str, str, dict[str, int], list[str]]] = {}
    for template, sets in templates.items():
        for kind, entry in ((kind, entry) for found in sets.values() for kind, entry in found["kinds"].items()):
            name, right, why = next((rest for pattern, *rest in VERDICTS if re.match(pattern, kind)),
                                    (kind, "not judged", ""))
            _, _, counts, known = out.setdefault(name, (right, why, {}, []))
            of = kind.partition(":")[0]
            counts[of] = counts.get(of, 0) + entry["count"]
            if template not in known:
                known.append(template)
    return out


def _sum(sets: dict[str, Any], *keys: str) -> int:
    total = 0
    for found in sets.values():
        for key in keys:
            found = found[key]
        total += found
    return total


def _both(sets: dict[str, Any], key: str) -> str:
    return f"{_sum(sets, key, 'trl'):,}, {_sum(sets, key, 'ours'):,}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
