"""The boundary between prompt and completion, the end of a turn, and truncation: with real tokenizers, built on the
spot."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_tokenizers import (
    CHATML,
    ENDS_OTHERWISE,
    LLAMA3,
    NO_END,
    OPENS_THINK,
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

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.data.rows import read_rows
from dpo_dist.data.tokenize import Dropped, TruncationReport, truncate
from dpo_dist.types import PreferenceRow, TokenizedPair

GOLDEN = Path(__file__).parents[1] / "golden"


# -------------------------------------------------------------------------------------------------------- the boundary


def test_the_prompt_is_what_generation_sees_and_the_completion_ends_with_the_end_of_turn():
    assert texts(bpe(CHATML), chat()) == ("<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n",
                                          "It is four.<|im_end|>", "Five!<|im_end|>")


def test_the_prompt_ids_are_those_of_generation():
    for tokenizer in (bpe(CHATML), bpe(LLAMA3, adds_bos=True), bpe(QWEN3), sentencepiece_like(CHATML)):
        pair = make_tokenize(tokenizer, config())(chat())
        at_generation = tokenizer.apply_chat_template([user("Two and two?")], add_generation_prompt=True,
                                                      return_dict=False)
        assert list(pair.prompt_ids) == at_generation


def test_text_becomes_one_turn_under_a_template():
    row = PreferenceRow("Two and two?", "It is four.", "Five!", "rows.jsonl:1")
    assert texts(bpe(CHATML), row) == texts(bpe(CHATML), chat())


def test_there_is_one_bos_where_the_template_and_the_tokenizer_both_have_one():
    tokenizer = bpe(LLAMA3, adds_bos=True)
    pair = make_tokenize(tokenizer, config())(chat())
    assert [ids.count(tokenizer.bos_token_id) for ids in (pair.prompt_ids, pair.chosen_ids,
                                                          pair.rejected_ids)] == [1, 0, 0]
    assert pair.prompt_ids[0] == tokenizer.bos_token_id


def test_a_template_that_trims_answers_keeps_the_boundary():
    prompt, chosen, _ = texts(bpe(LLAMA3), chat("  It is four.\n\n"))
    assert prompt.endswith("<|start|>assistant<|end|>\n\n") and chosen == "It is four.<|eot|>"


def test_white_space_after_the_generation_prompt_belongs_to_the_prompt():
    assert texts(bpe(SPACED), chat(" It is four. "))[:2] == ("user: Two and two?<|end|>\nassistant:\n",
                                                             "It is four.<|end|>")


def test_an_empty_think_block_that_the_template_puts_before_an_answer_is_part_of_the_completion():
    prompt, chosen, _ = texts(bpe(QWEN3), chat())
    assert prompt.endswith("<|im_start|>assistant\n") and chosen == "<think>\n\n</think>\n\nIt is four.<|im_end|>"


def test_a_template_whose_generation_prompt_is_not_how_answers_begin_is_an_error():
    other = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>model\\n' }}")
    with pytest.raises(UserError, match=r"data\.chat_template \(the tokenizer's own\) has no boundary .*model"):
        make_tokenize(bpe(other), config())
    cuts = OPENS_THINK.replace("m.content +", "m.content.split('</think>')[-1] +")       # as DeepSeek-R1's
    with pytest.raises(UserError, match=r"has no boundary .*<think>"):
        make_tokenize(bpe(cuts), config())


def test_where_a_generation_prompt_opens_the_thinking_answers_that_begin_with_theirs_go_on_from_there():
    """As OLMo 3 Think's rows under its template."""
    thought = chat("<think>\nTwice.\n</think>\n\nIt is four.", rejected="<think>\nOh.\n</think>\n\nFive!")
    assert texts(bpe(OPENS_THINK), thought) == (
        "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "Twice.\n</think>\n\nIt is four.<|im_end|>", "Oh.\n</think>\n\nFive!<|im_end|>")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template renders the prompt otherwise .*<think>"):
        make_tokenize(bpe(OPENS_THINK), config())(chat())


def test_a_row_that_the_template_renders_otherwise_once_an_answer_follows_is_an_error_or_counted():
    template = CHATML.replace("m.content", "(m.content if messages | length < 4 else 'cut')")
    row = PreferenceRow((user("a"), assistant("b"), user("c")), (assistant("d"),), (assistant("e"),), "rows.jsonl:7")
    with pytest.raises(UserError, match=r"rows\.jsonl:7: the chat template renders the prompt otherwise .* "
                                        r"data\.on_bad_row=skip"):
        make_tokenize(bpe(template), config())(row)
    dropped = make_tokenize(bpe(template), config(on_bad_row="skip"))(row)
    assert isinstance(dropped, Dropped) and dropped.reason == "does not fit the chat template"


def test_a_row_that_the_template_refuses_is_an_error_that_names_it():
    template = CHATML.replace("{%- for m in messages %}", "{%- for m in messages %}{% if m.role == 'system' %}"
                              "{{ raise_exception('no system turns') }}{% endif %}")
    row = PreferenceRow(({"role": "system", "content": "s"}, user("a")), (assistant("d"),), (assistant("e"),),
                        "rows.jsonl:7")
    with pytest.raises(UserError, match=r"rows\.jsonl:7: the chat template refuses the row \(no system turns\)"):
        make_tokenize(bpe(template), config())(row)


def test_all_turns_of_a_continuation_are_completion():
    row = PreferenceRow((user("a"),), (assistant("b"), user("c"), assistant("d")), (assistant("e"),), "rows.jsonl:1")
    assert texts(bpe(CHATML), row)[1] == (
        "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>")


def test_a_completion_is_tokenized_as_it_stands_in_the_conversation_where_the_tokenizer_puts_a_space_before_text():
    llama2 = ("{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + "
              "eos_token }}"
              "{% endfor %}")
    for template in (llama2, CHATML):
        tokenizer = sentencepiece_like(template)
        pair = make_tokenize(tokenizer, config())(chat())
        whole = tokenizer.apply_chat_template([user("Two and two?"), assistant("It is four.")], return_dict=False)
        assert list(pair.prompt_ids + pair.chosen_ids) == whole[:len(pair.prompt_ids + pair.chosen_ids)]


# ---------------------------------------------------------------------------------------------------- the end of a turn


def test_what_a_template_puts_after_the_end_of_turn_is_cut():
    assert texts(bpe(PHI3), chat())[1] == "It is four.<|end|>"


def test_what_follows_only_the_last_answer_is_no_part_of_its_end():
    phi4 = PHI3.replace("'<|end|>\\n'", "'<|end|>'")
    assert texts(bpe(phi4), chat())[1] == "It is four.<|end|>"


def test_an_end_of_turn_may_be_two_tokens():
    cohere = CHATML.replace("m.content + '<|im_end|>\\n'", "m.content + '<|end|><|eot|>'")
    assert texts(bpe(cohere), chat())[1] == "It is four.<|end|><|eot|>"
    assert texts(bpe(cohere), chat("It is four.<|end|><|eot|>"))[1] == "It is four.<|end|><|eot|>"


def test_an_end_of_turn_that_the_last_answer_alone_has_is_kept():
    gptoss = CHATML.replace("'<|im_end|>\\n'", "('<|eot|>' if loop.last and m.role == 'assistant' else '<|end|>')")
    assert texts(bpe(gptoss), chat())[1] == "It is four.<|eot|>"


def test_eos_ends_a_completion_where_the_template_has_no_end_of_turn():
    assert texts(bpe(NO_END), chat())[:2] == ("user: Two and two?\n\nassistant:", " It is four.</s>")


def test_an_end_of_turn_that_is_already_in_the_data_is_not_doubled():
    assert texts(bpe(CHATML), chat("It is four.<|im_end|>"))[1] == "It is four.<|im_end|>"
    assert texts(bpe(), PreferenceRow("Two?", " It is four.</s>", " No.", "here"))[1] == " It is four.</s>"


def test_another_end_that_a_template_uses_after_tool_calls_is_kept():
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    row = PreferenceRow((user("a"),), (call,), (assistant("e"),), "rows.jsonl:1")
    assert texts(bpe(ENDS_OTHERWISE), row)[1:] == (
        '[{"type": "function", "function": {"name": "f", "arguments": {}}}]<|eom|>', "e<|im_end|>")


def test_tools_that_the_template_would_leave_out_are_an_error():
    row = PreferenceRow((user("a"),), (assistant("b"),), (assistant("e"),), "rows.jsonl:1", tools=({"name": "f"},))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template .* leaves out tools: 'f'"):
        make_tokenize(bpe(CHATML), config())(row)
    shown = CHATML.replace("{%- for", "{% if tools %}{{ tools[0].name }}{% endif %}{%- for", 1)
    assert texts(bpe(shown), row)[0].startswith("f<|im_start|>user")


# --------------------------------------------------------------------------------------------- templates and plain text


def test_plain_text_is_taken_as_it_is_with_the_tokenizers_bos_and_eos():
    row = PreferenceRow("Two and two?", " It is four.", " Five!", "rows.jsonl:1")
    assert texts(bpe(), row) == ("Two and two?", " It is four.</s>", " Five!</s>")
    assert texts(bpe(adds_bos=True), row) == ("<s>Two and two?", " It is four.</s>", " Five!</s>")
    assert texts(bpe(CHATML, adds_bos=True), row, chat_template="none")[0] == "<s>Two and two?"


def test_a_bos_that_is_already_in_plain_text_is_not_doubled():
    assert texts(bpe(adds_bos=True), PreferenceRow("<s>Two?", " A.", " B.", "here"))[0] == "<s>Two?"


def test_messages_without_a_template_are_an_error_with_a_remedy():
    for tokenizer, setting in ((bpe(), None), (bpe(CHATML), "none")):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: messages need a chat template.* set data\.chat_template"):
            make_tokenize(tokenizer, config(chat_template=setting))(chat())


def test_a_template_may_be_a_file_or_literal_text(tmp_path):
    (tmp_path / "chat.jinja").write_text(SPACED)
    for setting in (SPACED, str(tmp_path / "chat.jinja")):
        assert texts(bpe(CHATML), chat(), chat_template=setting)[0] == "user: Two and two?<|end|>\nassistant:\n"


def test_a_template_that_is_neither_a_file_nor_jinja_is_an_error():
    with pytest.raises(UserError, match=r"data\.chat_template='chatml' is neither"):
        make_tokenize(bpe(CHATML), config(chat_template="chatml"))
    with pytest.raises(UserError, match=r"data\.chat_template .* cannot render one question and its answer"):
        make_tokenize(bpe(CHATML), config(chat_template="{% for m in %}"))


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day():
    dated = "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') + '\\n' }}{% endif %}" + CHATML
    assert texts(bpe(dated), chat())[0].startswith("26 Jul 2024\n<|im_start|>user")


def test_a_tokenizer_without_eos_is_an_error():
    tokenizer = bpe(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        make_tokenize(tokenizer, config())


def test_text_without_a_tokenizer_is_an_error_and_token_ids_are_not():
    tokenize = make_tokenize(None, config())
    with pytest.raises(UserError, match=r"rows\.jsonl:1: text needs a tokenizer"):
        tokenize(chat())
    assert tokenize(ids(3, 2, 1)) == ids(3, 2, 1)


def test_what_differs_as_text_but_not_as_tokens_is_dropped():
    dropped = make_tokenize(bpe(LLAMA3), config())(chat("Four.", rejected="Four. "))
    assert isinstance(dropped, Dropped) and dropped.reason == "identical once tokenized"


# ---------------------------------------------------------------------------------------------------------- truncation


def ids(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    """A pair of the given lengths, every token different."""
    whole = tuple(range(prompt + chosen + rejected))
    return TokenizedPair(whole[:prompt], whole[prompt:prompt + chosen], whole[prompt + chosen:], "rows.jsonl:1")


def cut(pair: TokenizedPair, truncation: str, max_length: int) -> TokenizedPair | Dropped:
    return truncate(pair, config(truncation=truncation, max_length=max_length))


def test_keep_start_cuts_the_golden_rows_as_trl_does():
    golden = json.loads((GOLDEN / "golden.json").read_text())["collator_max24_keep_start"]
    rows, _ = read_rows(DatasetConfig(str(GOLDEN / "rows.json")), "error")
    kept = 0
    for i, pair in enumerate(rows):
        wanted = []
        for at in (i, i + 8):                # TRL's collator lays out all chosen sequences, then all rejected ones
            columns = (golden[key][at] for key in ("input_ids", "attention_mask", "completion_mask"))
            real = [(token, in_completion) for token, is_real, in_completion in zip(*columns, strict=True) if is_real]
            wanted.append((tuple(t for t, c in real if not c), tuple(t for t, c in real if c)))
        got = cut(pair, "keep_start", 24)
        if isinstance(got, Dropped):
            assert wanted[0][1] == wanted[1][1] == () and got.reason == "no completion token left"
        else:
            assert [(got.prompt_ids, got.chosen_ids), (got.prompt_ids, got.rejected_ids)] == wanted
            kept += 1
    assert kept == 5


def test_a_pair_that_fits_exactly_is_the_very_same():
    for truncation in ("drop", "error", "keep_start", "keep_end"):
        pair = ids(4, 6, 2)
        assert cut(pair, truncation, 10) is pair


def test_drop_and_error_leave_nothing_of_a_longer_pair():
    assert cut(ids(4, 6, 2), "drop", 9) == Dropped("rows.jsonl:1", "longer than data.max_length", "10 tokens")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 10 tokens are more than data\.max_length=9"):
        cut(ids(4, 6, 2), "error", 9)


def test_keep_end_cuts_the_same_prompt_tokens_for_both_completions():
    pair = ids(4, 6, 2)
    got = cut(pair, "keep_end", 8)
    assert got == TokenizedPair(pair.prompt_ids[2:], pair.chosen_ids, pair.rejected_ids, pair.where)


def test_keep_end_keeps_a_prompt_token_or_drops_the_pair():
    assert cut(ids(4, 6, 2), "keep_end", 7).prompt_ids == (3,)
    assert cut(ids(4, 6, 2), "keep_end", 6) == Dropped("rows.jsonl:1", "no prompt token left", "10 tokens")


def test_completions_that_are_identical_once_truncated_are_dropped():
    pair = TokenizedPair((1, 2), (3, 4, 5), (3, 4, 6), "rows.jsonl:1")
    assert cut(pair, "keep_start", 4) == Dropped("rows.jsonl:1", "identical once truncated")


def test_what_counts_is_cut_with_the_tokens_and_a_completion_of_which_nothing_counts_is_dropped():
    pair = replace(ids(2, 4, 3), chosen_counts=(False, True, False, True), rejected_counts=(True, False, True))
    got = cut(pair, "keep_start", 4)
    assert (got.chosen_counts, got.rejected_counts) == ((False, True), (True, False))
    assert cut(pair, "keep_end", 5).chosen_counts == pair.chosen_counts
    assert cut(pair, "keep_start", 3) == Dropped("rows.jsonl:1", "no token that counts is left in a completion",
                                                 "chosen")
    assert cut(replace(pair, rejected_counts=(False,) * 3), "drop", 9) == Dropped(
        "rows.jsonl:1", "no token of a completion counts", "rejected")


def test_the_report_counts_kept_truncated_and_dropped_pairs():
    report = TruncationReport()
    for pair in (ids(4, 6, 2), ids(1, 2, 3), ids(9, 1, 2)):
        report.add(pair, cut(pair, "keep_start", 8))
    assert (report.kept, report.truncated, report.dropped.counts) == (2, 1, {"no completion token left": 1})
