"""What a chat template leaves out of a row is found, whatever it is; what it shows in another way is not taken for a
loss."""
from __future__ import annotations

import pytest
from made_tokenizers import CHATML, LLAMA3, QWEN3, assistant, bpe, config, make_tokenize, texts, user

from dpo_dist.config.errors import UserError
from dpo_dist.data.tokenize import Dropped, PairTokenizer, TruncationReport, truncate
from dpo_dist.types import PreferenceRow, TokenizedPair

KNOWN_ROLES = CHATML.replace("{%- for m in messages %}", "{%- for m in messages if m.role in ('user', 'assistant') %}")
CUTS_ALL_THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
CUTS_EARLIER_THINKING = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
REASONS = CHATML.replace("m.content", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + "
                                      "m.content")
CALLS = CHATML.replace("m.content + ", "m.content + (m.tool_calls | map(attribute='function') | map('tojson') | join "
                                       "if m.tool_calls else '') + ")
NAMES_CALLS = CALLS.replace("map('tojson')", "map(attribute='name')")
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CALLS
NAMES_TOOLS = "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join }}{% endif %}" + CALLS
MISTRAL = ("{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{% for m in messages %}"
           "{% if m.role == 'user' %}[INST] {{ messages[0].content + '\\n\\n' if m == last }}{{ m.content }} [/INST]"
           "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}")

SYSTEM = {"role": "system", "content": "Be kind."}
TOOL = {"type": "function", "function": {"name": "clock", "description": "Tells the time.", "parameters": {
    "type": "object", "properties": {"zone": {"type": "string", "enum": ["utc", "cet"]}}, "required": ["zone"]}}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "clock", "arguments": {"zone": "ut\"c"}}}
ANSWERED = (user("Time?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "12:05", "tool_call_id": "c"})
THOUGHT = "<think>\nlet me see\n</think>\n\n"


def row(prompt: object = "Two and two?", chosen: object = "It is four.", rejected: object = "Five!",
        **more: object) -> PreferenceRow:
    def turns(part: object, role: str) -> object:
        return ({"role": role, "content": part},) if isinstance(part, str) else part
    return PreferenceRow(turns(prompt, "user"), turns(chosen, "assistant"), turns(rejected, "assistant"),
                         "rows.jsonl:3", **more)


@pytest.mark.parametrize("template, given, what", [
    (KNOWN_ROLES, row((SYSTEM, user("a"))), "prompt turn 1: .* content of system turns: 'Be kind.'"),
    (KNOWN_ROLES, row(({"role": "developer", "content": "a"}, user("a"))), "turn 1: .* content of developer turns"),
    (KNOWN_ROLES, row((user("a"), assistant("b"), {"role": "tool", "content": "b"})), "turn 3: .* content of tool"),
    (KNOWN_ROLES, row(chosen=(assistant("a"), {"role": "tool", "content": "a"}, assistant("a"))),
     "chosen turn 2: .* content of tool turns"),
    (CHATML, row(chosen=(assistant("4", reasoning_content="4"),)), "chosen turn 1: .* reasoning_content of assistant"),
    (CHATML, row(rejected=(assistant("5", thinking="five"),)), "rejected turn 1: .* thinking of .*: 'five'"),
    (CHATML, row(rejected=(assistant("5", reasoning="five"),)), "rejected turn 1: .* reasoning of assistant turns"),
    (CHATML, row(rejected=(assistant("5", refusal="I will not"),)), "rejected turn 1: .* refusal of assistant turns"),
    (CUTS_ALL_THINKING, row(chosen=THOUGHT + "It is four."), "chosen turn 1: .* content of assistant turns"),
    (CUTS_ALL_THINKING, row(rejected=THOUGHT + "Five!"), "rejected turn 1: .* content of assistant turns"),
    (CUTS_ALL_THINKING, row("what does </think> mean?"), "prompt turn 1: .* content of user turns"),
    (CUTS_EARLIER_THINKING, row(chosen=(assistant(THOUGHT + "a"), user("b"), assistant("c"))), "chosen turn 1: .*"),
    (CHATML, row(chosen=(assistant("", tool_calls=[CALL]),)), "chosen turn 1: .* tool_calls of .*: 'clock'"),
    (CHATML, row(ANSWERED), "prompt turn 2: .* tool_calls of assistant turns"),
    (NAMES_CALLS, row(chosen=(assistant("", tool_calls=[CALL]),)), "chosen turn 1: .* tool_calls .*: 'zone'"),
    (CALLS, row(tools=(TOOL,)), "leaves out tools: 'clock'"),
    (NAMES_TOOLS, row(tools=(TOOL,)), "leaves out tools: 'Tells the time.'"),
    (CHATML, row(template_kwargs={"documents": [{"title": "t", "text": "a book"}]}), "leaves out documents: 'a book'"),
    (CHATML.replace("m.content", "m.content[:20]"), row(chosen="a" * 21), "chosen turn 1: .* content of assistant"),
    (CHATML.replace("m.content", "m.content | replace('**', '')"), row(chosen="**four**"), "chosen turn 1: .* content"),
])
def test_what_a_template_leaves_out_is_refused_with_turn_field_and_template(template: str, given: PreferenceRow,
                                                                            what: str):
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{what}.*data\.on_missing_content=warn") as refused:
        make_tokenize(bpe(template), config())(given)
    assert "(the tokenizer's own)" in str(refused.value)
    dropped = make_tokenize(bpe(template), config(on_bad_row="skip"))(given)
    assert isinstance(dropped, Dropped) and dropped.reason.startswith("the chat template leaves out ")
    kept = make_tokenize(bpe(template), config(on_missing_content="warn"))(given)
    assert isinstance(kept, TokenizedPair) and len(kept.left_out) == 1


@pytest.mark.parametrize("template, given", [
    (LLAMA3, row("  spaces \n\n around ", "\n\n a \n")),                               # trimmed
    (CUTS_EARLIER_THINKING, row((user("a"), assistant(THOUGHT + "b"), user("c")))),      # thinking of the history
    (QWEN3, row((user("a"), assistant("b", reasoning_content="hm"), user("c")))),
    (REASONS, row(chosen=(assistant("4", reasoning_content="two and two"),))),
    (REASONS, row(chosen=(assistant("4", thinking="two and two"),))),
    (REASONS, row(chosen=(assistant("4", reasoning="two and two"),))),
    (CHATML, row(chosen=THOUGHT + "It is four.")),
    (CHATML, row(chosen="It is four.<|im_end|></s>")),
    (CHATML.replace("m.content", "m.content | replace('</think>\\n\\n', '</think>')"), row(chosen=THOUGHT + "four")),
    (CHATML.replace("m.content", "m.content | replace('<think>', '[THINK]') | replace('</think>', '[/THINK]')"),
     row(chosen=THOUGHT + "It is four.")),
    (CHATML.replace("m.content", "m.content | tojson"), row('"quoted"\nlines é', "北京\n\"x\"", "tab\t")),
    (CHATML.replace("m.content", "'\\n> '.join(m.content.split('\\n'))"), row(chosen="one\ntwo\n\nthree")),
    (CALLS, row(ANSWERED, chosen=(assistant("now", tool_calls=[CALL, CALL]),))),
    (TOOLS, row(ANSWERED, tools=(TOOL, {"type": "function", "function": {"name": "noargs"}}))),
    (MISTRAL, row((SYSTEM, user("a"), assistant("b"), user("c")))),
    ("{{ documents[0].text if documents }}" + CHATML, row(template_kwargs={"documents": [{"text": "a book"}]})),
])
def test_what_a_template_shows_in_another_way_is_taken(template: str, given: PreferenceRow):
    pair = make_tokenize(bpe(template), config())(given)
    assert isinstance(pair, TokenizedPair) and not pair.left_out


def test_a_cut_that_other_texts_hide_is_found():
    """Every word of the developer's turn stands elsewhere in the prompt."""
    given = row(({"role": "developer", "content": "Two"}, user("Two and two?")))
    with pytest.raises(UserError, match="content of developer turns"):
        make_tokenize(bpe(KNOWN_ROLES), config())(given)


def test_rows_that_are_kept_though_incomplete_are_counted_by_what_is_missing():
    settings = config(on_missing_content="warn")
    rows = [row(chosen=(assistant("4", reasoning_content="a"),)), row((SYSTEM, user("a"))), row()]
    report = TruncationReport()
    for pair in PairTokenizer.of(bpe(KNOWN_ROLES), settings).encode(rows):
        report.add(pair, truncate(pair, settings))
    assert report.kept == 3 and report.left_out.counts == {
        "the chat template leaves out reasoning_content of assistant turns in a completion": 1,
        "the chat template leaves out content of system turns in the prompt": 1}


def test_a_kind_of_row_is_tried_once():
    encoder = PairTokenizer.of(bpe(CHATML), config())
    encoder.encode([row(f"question {i}", f"answer {i}") for i in range(50)])
    [shown] = encoder.shown.values()
    assert len(shown.of_kinds) == 1
    encoder.encode([row((SYSTEM, user("a")))])
    assert len(shown.of_kinds) == 2


def test_an_empty_system_turn_and_an_empty_think_block_are_no_loss():
    given = row(({"role": "system", "content": " "}, user("a")), chosen="<think>\n\n</think>\n\nfour")
    assert texts(bpe(CHATML), given)[1] == "<think>\n\n</think>\n\nfour<|im_end|>"
