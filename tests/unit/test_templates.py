"""Which template renders a row, with which variables; texts that were rendered already; and what of a completion of
several turns the assistant says."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_tokenizers import (
    CHATML,
    LLAMA3,
    NO_END,
    PHI3,
    QWEN3,
    SPACED,
    assistant,
    bpe,
    chat,
    config,
    make_tokenize,
    sentencepiece_like,
    texts,
    user,
)
from tokenizers import AddedToken

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.prepare import fingerprint
from dpo_dist.data.tokenize import Dropped
from dpo_dist.export import copy_templates
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.types import PreferenceRow, TokenizedPair

TOOL = {"name": "clock", "description": "Tells the time."}
TOOL_USE = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
RAG = "{{ documents[0].text if documents else 'no documents' }}" + CHATML
NAMED = {"default": CHATML, "tool_use": TOOL_USE, "rag": RAG}
THINKS = CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n{{ '' if enable_thinking else 'x' }}")
DATED = "<|im_start|>system\nIt is {{ day or 'Friday' }}.<|im_end|>\n" + CHATML.replace("m.role", "m['role']")
SWITCHED = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""


def of(prompt: object, chosen: object = " It is four.", rejected: object = " Five!", **more: object) -> PreferenceRow:
    return PreferenceRow(prompt, chosen, rejected, "rows.jsonl:3", **more)


# ------------------------------------------------------------------------------------------------------- which template


def test_rows_with_tools_take_the_tool_use_template_as_in_transformers():
    tokenizer = bpe(NAMED)
    with_tools = of((user("Time?"),), (assistant("Now."),), (assistant("No."),), tools=(TOOL,))
    for row in (chat(), with_tools):
        expected = tokenizer.apply_chat_template(list(row.prompt), tools=list(row.tools) or None, tokenize=False,
                                                 add_generation_prompt=True)
        assert texts(tokenizer, row)[0] == expected


def test_a_template_of_the_tokenizer_is_chosen_by_its_name():
    row = of((user("Who?"),), (assistant("I."),), (assistant("You."),),
             template_kwargs={"documents": [{"text": "a book"}]})
    assert texts(bpe(NAMED), row, chat_template="rag")[0].startswith("a book<|im_start|>user")
    assert texts(bpe(NAMED), chat(), chat_template="rag")[0].startswith("no documents<|im_start|>user")
    with pytest.raises(UserError, match=r"data\.chat_template='raq' is neither .*\(default, tool_use, rag\)"):
        make_tokenize(bpe(NAMED), config(chat_template="raq"))


def test_several_templates_without_a_default_are_an_error_that_lists_them():
    with pytest.raises(UserError, match=r"several chat templates \(one, two\) .* set data\.chat_template"):
        make_tokenize(bpe({"one": CHATML, "two": SPACED}), config())


def test_variables_reach_the_template_a_rows_own_before_those_of_all():
    def ends(row: PreferenceRow, **variables: object) -> str:
        return texts(bpe(SWITCHED), row, chat_template_kwargs=variables or None)[0][-29:]
    own = of((user("a"),), (assistant("b"),), (assistant("c"),), template_kwargs={"enable_thinking": False})
    assert ends(chat()).endswith("<|im_start|>assistant\n")
    assert ends(chat(), enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert ends(own).endswith("<think>\n\n</think>\n\n")
    assert ends(own, enable_thinking=True).endswith("<think>\n\n</think>\n\n")
    assert texts(bpe(SWITCHED), own)[1] == "b<|im_end|>"


def test_variables_without_a_template_are_an_error():
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs are given, but there is no chat template"):
        make_tokenize(bpe(), config(chat_template_kwargs={"enable_thinking": False}))
    row = of("a", "b", "c", template_kwargs={"enable_thinking": False})
    with pytest.raises(UserError, match=r"rows\.jsonl:3: the row has chat_template_kwargs, but there is no"):
        make_tokenize(bpe(), config())(row)


def test_a_template_that_thinks_names_the_variable_that_stops_it():
    opens = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n' }}"
                           "{% if enable_thinking is not false %}{{ '<think>\\n' }}{% endif %}")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*data\.chat_template_kwargs=\{enable_thinking: false\}"):
        make_tokenize(bpe(opens), config())(chat())
    assert texts(bpe(opens), chat(), chat_template_kwargs={"enable_thinking": False})[1] == "It is four.<|im_end|>"


def test_a_template_whose_answers_have_a_boundary_only_with_reasoning_takes_those_rows():
    opens = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>' }}").replace(
        "m.content + ", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content + ")
    reasoned = of((user("a"),), (assistant("b", reasoning_content="so"),), (assistant("c", reasoning_content="no"),))
    assert texts(bpe(opens), reasoned)[1] == "so</think>b<|im_end|>"
    with pytest.raises(UserError, match="renders the prompt otherwise once an answer follows"):
        make_tokenize(bpe(opens), config())(chat())


def test_a_row_without_reasoning_that_suits_a_template_only_without_thinking_names_the_variable_that_stops_it():
    """As Nemotron 3's: a generation prompt opens <think>, and an answer without reasoning has an empty one."""
    think = "{{ '<think></think>' if enable_thinking is false else '<think>\\n' }}"
    thinks = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n' }}" + think).replace(
        "m.content + ", "('<think>' + ('\\n' + m.reasoning_content if m.reasoning_content else '') + '</think>' "
        "if m.role == 'assistant' else '') + m.content + ")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*data\.chat_template_kwargs=\{enable_thinking: false\}"):
        make_tokenize(bpe(thinks), config())(of("a"))
    assert texts(bpe(thinks), of("a"), chat_template_kwargs={"enable_thinking": False})[1].endswith("four.<|im_end|>")


def test_a_template_that_wants_contents_in_parts_gets_them():
    parts = CHATML.replace("m.content", "m.content[0].text")
    assert texts(bpe(parts), chat()) == texts(bpe(CHATML), chat())


def test_a_template_that_wants_arguments_as_text_gets_them_as_text():
    said = "{% for c in m.tool_calls or [] %}{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}"
    turn = assistant("", tool_calls=[{"function": {"name": "clock", "arguments": {"zone": "über", "n": None}}}])
    row = of((user("a"),), (turn,), (assistant("c"),))
    template = CHATML.replace("m.content +", "m.content }}" + said + "{{")
    assert texts(bpe(template), row)[1] == 'clock({"zone": "über", "n": null})<|im_end|>'


@pytest.mark.parametrize("row", [
    of((user("a"),), (assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}]),),
       (assistant("c"),)),
    of((user("a"),), (assistant("b"),), (assistant("c"),), tools=({"name": "\ud83d"},)),
])
def test_half_a_character_in_a_call_or_a_tool_is_a_row_that_does_not_fit(row: PreferenceRow):
    template = "{{ tools | tojson }}" + CHATML.replace("m.content +", "m.content }}{{ m.tool_calls | tojson }}{{")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .* is not valid Unicode once rendered; mend the row"):
        make_tokenize(bpe(template.replace("m.tool_calls |", "(m.tool_calls or []) |")), config())(row)


def test_templates_and_variables_decide_the_store(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    data = (DatasetConfig(path=str(tmp_path / "a.jsonl")),)
    found = [fingerprint(config(train=data, **changes), bpe(template), "digest") for template, changes in (
        (CHATML, {}), (NAMED, {}), ({**NAMED, "tool_use": TOOL_USE + " "}, {}), (NAMED, {"chat_template": "tool_use"}),
        (CHATML, {"chat_template_kwargs": {"a": 1}}), (CHATML, {"chat_template_kwargs": {"a": 2}}),
        (CHATML, {"train_on": "completion"}), (CHATML, {"on_missing_content": "warn"}))]
    assert len(set(found)) == len(found)
    assert found[0] == fingerprint(config(train=data, chat_template=CHATML), bpe(LLAMA3), "digest")


@pytest.mark.parametrize("setting, expected", [(None, NAMED), ("tool_use", NAMED), ("none", NAMED), (SPACED, SPACED)])
def test_the_export_has_all_of_the_tokenizers_templates_or_the_one_that_was_given(tmp_path: Path, setting: str | None,
                                                                                  expected: object):
    source, partial = tmp_path / "model", tmp_path / "export"
    bpe(NAMED).save_pretrained(source)
    partial.mkdir()
    for file in source.glob("*.*"):
        (partial / file.name).write_bytes(file.read_bytes())
    copy_templates(source, partial, setting)
    assert load_tokenizer(partial).chat_template == expected


# ------------------------------------------------------------------------------------------- texts rendered already


@pytest.mark.parametrize("template, row, sign", [
    (CHATML, of("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"), "prompt holds '<|im_end|>'"),
    (CHATML, of("Two?<|im_end|>"), "prompt holds '<|im_end|>'"),
    (LLAMA3, of("<s><|start|>user<|end|>\n\nTwo?<|eot|>"), "prompt holds"),
    (CHATML, of("<s>Two?"), "prompt begins with '<s>'"),
    (NO_END, of("user: Two?\n\nassistant:"), "prompt ends with 'assistant:'"),
    (NO_END, of("user: Two?"), "prompt begins with 'user:'"),
    (CHATML, of((user("<|im_start|>user\nTwo?<|im_end|>\n"),), (assistant("b"),), (assistant("c"),)),
     "prompt begins with '<|im_start|>user'"),
    (CHATML, of((user("<|im_start|>system\nBe kind.<|im_end|>\n"),), (assistant("b"),), (assistant("c"),)),
     "prompt begins with '<|im_start|>system'"),
    (LLAMA3, of((user(" <s><|start|>user"),), (assistant("b"),), (assistant("c"),)), "prompt begins with '<s>'"),
    (DATED, of((user("<|im_start|>system\nIt is Monday.<|im_end|>\n"),), (assistant("b"),), (assistant("c"),)),
     "prompt begins with '<|im_start|>'"),
    (CHATML, of("Two?", "<|im_start|>assistant\nFour.<|im_end|>"), "chosen holds '<|im_start|>'"),
    (CHATML, of("Two?", "Four.", "Five.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>"), "rejected holds"),
    (CHATML, of((user("a"),), (assistant("<|im_start|>assistant\nFour."),), (assistant("c"),)),
     "chosen begins with '<|im_start|>assistant'"),
    (NO_END, of("Two?", "assistant: Four."), "chosen begins with 'assistant:'"),
])
def test_a_text_that_is_rendered_already_is_refused(template: str, row: PreferenceRow, sign: str):
    with pytest.raises(UserError) as refused:
        make_tokenize(bpe(template), config())(row)
    assert f"rows.jsonl:3: {sign}" in str(refused.value) and "data.chat_template=none" in str(refused.value)
    dropped = make_tokenize(bpe(template), config(on_bad_row="skip"))(row)
    assert isinstance(dropped, Dropped) and dropped.reason.startswith("is rendered already")


@pytest.mark.parametrize("template, row", [
    (CHATML, of("What does a user see?", "The assistant: nothing.<|im_end|>")),
    (CHATML, of("Is a < b and b > c?", "<b>Yes</b>")),
    (CHATML, of((user("What is <|im_start|>?"),), (assistant("A token."),), (assistant("Nothing."),))),
    (LLAMA3, of((user("a"), assistant("b"), user("c")), (assistant("d"),), (assistant("e"),))),
    (NO_END, of("What does 'user: hello' mean?", "It is a user's.")),
])
def test_a_text_that_only_resembles_a_rendered_one_is_taken(template: str, row: PreferenceRow):
    assert isinstance(make_tokenize(bpe(template), config())(row), TokenizedPair)


def test_a_rendered_text_is_taken_as_it_is_without_a_template():
    row = of("<s><|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", "Four.<|im_end|></s>", "Five.")
    found = texts(bpe(CHATML, adds_bos=True), row, chat_template="none")
    assert found == (row.prompt, row.chosen, "Five.</s>")


# ----------------------------------------------------------------------------- what the assistant says in several turns

RESULT = {"role": "tool", "content": "18 degrees", "tool_call_id": "c1"}
CALL = assistant("", tool_calls=[{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {}}}])
CALLS = CHATML.replace("m.content + ", "m.content + (m.tool_calls | tojson if m.tool_calls else '') + ")
QWEN_LIKE = QWEN3.replace("m.content + ", "(m.tool_calls | tojson if m.tool_calls else '') + m.content + ")
# the last answer ends otherwise than those before, as in gpt-oss
OTHER_END = CHATML.replace("'<|im_end|>\\n'", "('<|eot|>' if loop.last and m.role == 'assistant' else '<|end|>')")
LLAMA2 = ("{% for m in messages %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + "
          "m.content + ' ' + eos_token }}{% endfor %}")


def said(tokenizer: object, row: PreferenceRow, **changes: object) -> list[str]:
    """The counted tokens of the chosen completion as text, a piece for each run of them."""
    pair = make_tokenize(tokenizer, config(**changes))(row)
    assert isinstance(pair, TokenizedPair), pair
    counts = pair.chosen_counts or (True,) * len(pair.chosen_ids)
    assert len(counts) == len(pair.chosen_ids)
    runs: list[list[int]] = []
    for i, (token, counted) in enumerate(zip(pair.chosen_ids, counts, strict=True)):
        if counted and not (i and counts[i - 1]):
            runs.append([])
        if counted:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template, chosen, runs", [
    (CHATML, (assistant("b"), user("c"), assistant("d")), ["b<|im_end|>", "d<|im_end|>"]),
    (CHATML, (assistant("b b"), user("b"), assistant("b"), user("b"), assistant("b")),
     ["b b<|im_end|>", "b<|im_end|>", "b<|im_end|>"]),
    (CALLS, (CALL, RESULT, assistant("warm")), ['[{"id": "c1", "type": "function", "function": {"name": "weather", '
                                                '"arguments": {}}}]<|im_end|>', "warm<|im_end|>"]),
    (CHATML, (assistant("b"), {"role": "system", "content": "c"}, user("d"), assistant("e")),
     ["b<|im_end|>", "e<|im_end|>"]),
    (LLAMA3, (assistant(" b "), user(" c "), assistant(" d ")), ["b<|eot|>", "d<|eot|>"]),
    (PHI3, (assistant("b"), user("c"), assistant("d")), ["b<|end|>", "d<|end|>"]),
    (QWEN3, (assistant("b"), user("c"), assistant("d")), ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]),
    (OTHER_END, (assistant("b"), user("c"), assistant("d")), ["b", "d<|eot|>"]),
    (NO_END, (assistant("b"), user("c"), assistant("d")), [" b", " d</s>"]),
    (CHATML, (assistant("ends <|im_end|> within"), user("c"), assistant("d")),
     ["ends <|im_end|> within<|im_end|>", "d<|im_end|>"]),
    (CHATML, (assistant("été 北京 😀"), user("été 北京"), assistant("😀")), ["été 北京 😀<|im_end|>", "😀<|im_end|>"]),
])
def test_in_a_completion_of_several_turns_only_the_assistants_own_tokens_count(template: str, chosen: tuple,
                                                                               runs: list[str]):
    row = of((user("a"),), chosen, (assistant("e"),))
    assert said(bpe(template), row) == runs
    assert len(said(bpe(template), row, train_on="completion")) == 1


def test_what_the_assistant_says_is_found_where_the_tokenizer_puts_a_space_before_text():
    row = of((user("a"),), (assistant("b"), user("c"), assistant("d")), (assistant("e"),))
    assert said(sentencepiece_like(CHATML), row) == ["b<|im_end|>", "d<|im_end|>"]
    assert [piece.strip() for piece in said(sentencepiece_like(LLAMA2), row)] == ["b </s>", "d </s>"]


GLM = """{%- for m in messages %}{{ '<|start|>' if m.role == 'user' else '<|eom|>' if m.role == 'tool' else '<|end|>' }}
{{- '\\n' + m.content + (m.tool_calls | tojson if m.tool_calls else '') }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|end|>' }}{% endif %}"""


def test_where_the_next_turns_token_is_what_generation_stops_at_it_ends_an_answer(tmp_path: Path):
    bpe(GLM).save_pretrained(tmp_path)
    row = of((user("a"),), (CALL, RESULT, assistant("warm")), (CALL,))
    untold = make_tokenize(load_tokenizer(tmp_path), config())(row)
    ids = load_tokenizer(tmp_path).convert_tokens_to_ids(["</s>", "<|start|>", "<|eom|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = load_tokenizer(tmp_path)
    told = make_tokenize(tokenizer, config())(row)
    assert untold.chosen_ids[-1] == untold.rejected_ids[-1] == ids[0]
    assert (told.chosen_ids[-1], told.rejected_ids[-1]) == (ids[1], ids[2])
    pieces = said(tokenizer, row)
    assert pieces[0].endswith("<|eom|>") and pieces[1] == "\nwarm<|start|>"


def test_an_answer_is_tokenized_as_it_stands_after_a_special_token_that_swallows_white_space():
    """As Phi 3's: a space before any text, also after a special token, which takes the line break behind it along."""
    tokenizer = sentencepiece_like(CHATML.replace("assistant\\n", "assistant<|eot|>\\n").replace("m.role +", (
        "(m.role + '<|eot|>' if m.role == 'assistant' else m.role) +")))
    tokenizer.add_tokens([AddedToken("<|eot|>", rstrip=True, special=True, normalized=False)])
    row = chat("It is four, I think.", rejected="It is five!")
    pair = make_tokenize(tokenizer, config())(row)
    for ids, answer in ((pair.chosen_ids, row.chosen), (pair.rejected_ids, row.rejected)):
        whole = tokenizer.apply_chat_template([*row.prompt, *answer], return_dict=False)
        assert list(pair.prompt_ids + ids) == whole[:len(pair.prompt_ids + ids)]


def test_an_answer_to_a_rendered_prompt_is_tokenized_as_it_stands_there():
    tokenizer = sentencepiece_like()
    for prompt in ("<s>Two and two?<|im_start|>", "Two and two?", "<s>Two and two?\n"):
        pair = make_tokenize(tokenizer, config(chat_template="none"))(of(prompt, "It is four.", "Five!"))
        whole = tokenizer(prompt.removeprefix("<s>") + "It is four.</s>", add_special_tokens=False)["input_ids"]
        begun = [tokenizer.bos_token_id] if prompt.startswith("<s>") else []
        assert [*pair.prompt_ids, *pair.chosen_ids] == begun + whole


def test_a_completion_of_one_turn_counts_whole():
    pair = make_tokenize(bpe(CHATML), config())(chat())
    assert pair.chosen_counts is None and pair.rejected_counts is None


def test_counted_or_not_the_ids_are_the_same():
    row = of((user("a"),), (assistant("b"), user("c"), assistant("d")), (assistant("e"),))
    counted, whole = (make_tokenize(bpe(CHATML), config(train_on=part))(row) for part in ("assistant", "completion"))
    assert (counted.prompt_ids, counted.chosen_ids, counted.rejected_ids) == (
        whole.prompt_ids, whole.chosen_ids, whole.rejected_ids)
    assert whole.chosen_counts is None and json.dumps(counted.chosen_counts)
