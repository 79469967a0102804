"""`dpo-dist show`: what it shows is what is trained on; it reads what it shows, and writes nothing."""
from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.data.rows import ReadReport
from dpo_dist.data.store import PairStore
from dpo_dist.data.tokenize import PairTokenizer
from dpo_dist.launcher import cli
from dpo_dist.runtime.terminal import page_console
from dpo_dist.show.__main__ import main
from dpo_dist.show.page import Page
from dpo_dist.show.rows import Look, Trained, look_at
from dpo_dist.show.text import Piece, decode, pieces_of, shortened, visible
from dpo_dist.types import TokenizedPair

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
BAD = {"prompt": "no rejected", "chosen": "a"}


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=template)


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer().save_pretrained(tmp_path / "m")
    return f"model.path={tmp_path / 'm'}"


def chat(n: int) -> dict:
    return {"prompt": [{"role": "user", "content": f"What is {n} and {n}?" + " Please." * (n % 4)}],
            "chosen": [{"role": "assistant", "content": f"It is {2 * n}."}],
            "rejected": [{"role": "assistant", "content": "No idea." * (1 + n % 3)}]}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown(*words: str, code: int = 0) -> str:
    out = io.StringIO()
    assert main(words, out) == code
    return out.getvalue()


def objects(*words: str) -> list[dict]:
    return [json.loads(line) for line in shown("--json", *words).splitlines()]


def look(path: str, rows: int = 3, seed: int = 0) -> Look:
    """With time for all that may be looked at."""
    config = compose(["model.path=m", f"data.train={path}"]).data
    return look_at(config.train[0], config, PairTokenizer.of(None, config), rows, seed, seconds=120)


# ------------------------------------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("words", [
    [], ["data.max_length=88"], ["data.max_length=88", "data.truncation=keep_end"], ["data.eval_fraction=0.5"],
    ["data.max_length=88", "data.truncation=keep_start", "data.eval_fraction=0.5"], ["data.chat_template=none"]])
def test_json_gives_the_very_pairs_of_training_in_order(words: list[str], model: str, tmp_path: Path):
    plain = "data.chat_template=none" in words
    rows = [{k: v if plain is False else v[0]["content"] for k, v in chat(n).items()} for n in range(12)]
    path = write(tmp_path / "rows.jsonl", [*rows[:5], BAD, *rows[5:]])
    words = [model, f"data.train=[{{path: {path}, format: {'preference' if plain else 'messages'}}}]",
             "data.on_bad_row=skip", f"data.cache_dir={tmp_path / 'tokens'}", *words]
    found = objects("--rows", "50", *words)
    assert [row["where"] for row in found] == [f"{path}:{line}" for line in range(1, 14)]
    assert found[5] == {"where": f"{path}:6", "data_set": path, "dropped": "rejected is missing",
                        "detail": "fields: prompt, chosen", "stopped_by": None}
    stores = prepare(compose(words).data, tokenizer(), "digest")
    for split, store in zip(("train", "eval"), stores, strict=True):
        assert [as_trained(row) for row in found if row.get("split") == split] == pairs_of(store)
    assert sum(map(len, stores)) == sum("dropped" not in row for row in found)
    assert objects("--rows", "2", *words) == found[:2]


def as_trained(row: dict) -> tuple:
    return tuple(row[key] for key in ("where", "prompt_ids", "chosen_ids", "rejected_ids", "chosen_counts",
                                      "rejected_counts"))


def pairs_of(store: PairStore) -> list[tuple]:
    def counts(given: tuple[bool, ...] | None, ids: tuple[int, ...]) -> list[int]:
        return [1] * len(ids) if given is None else [int(counted) for counted in given]

    return [(pair.where, list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids),
             counts(pair.chosen_counts, pair.chosen_ids), counts(pair.rejected_counts, pair.rejected_ids))
            for pair in (store[i] for i in range(len(store)))]


def test_json_texts_are_the_decoded_ids_and_a_record_of_rated_responses_gives_several_rows(model: str, tmp_path: Path):
    rated = {"prompt": "Hi", "responses": ["grüß dich", "no", "hello"], "ratings": [3, 1, 2]}
    found = objects(model, f"data.train=[{{path: {write(tmp_path / 'rated.jsonl', [rated])}, format: ratings}}]")
    assert [row["chosen"] for row in found] == ["grüß dich<|im_end|>", "grüß dich<|im_end|>", "hello<|im_end|>"]
    assert found[0]["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert found[0]["strength"] == 2 and len(found[0]["chosen_ids"]) == len("grüß dich".encode()) + 1


def test_every_reader_of_lines_takes_a_row_for_one_line(model: str, tmp_path: Path):
    text = "a\u2028b\x85c\x0bd"
    row = {"prompt": text, "chosen": "x", "rejected": "y"}
    out = io.StringIO()
    assert main(["--json", model, "data.train=" + write(tmp_path / "rows.jsonl", [row, row])], out) == 0
    first, second = map(json.loads, out.getvalue().splitlines())
    assert text in first["prompt"] and second["where"].endswith(":2")


def test_token_ids_need_no_tokenizer_and_have_no_texts(tmp_path: Path):
    (tmp_path / "m").mkdir()
    path = write(tmp_path / "ids.jsonl", [{"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 9, 1]}])
    words = [f"model.path={tmp_path / 'm'}", f"data.train={path}"]
    (row,) = objects(*words)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (None, None, None) and row["rejected_ids"] == [8, 9, 1]
    assert "5 6\n" in shown(*words) and "‹7 1›" in shown(*words)


# --------------------------------------------------------------------------------------------------------- for a person


def test_a_person_sees_texts_counted_tokens_ids_and_what_holds_for_all(model: str, tmp_path: Path):
    page = shown(model, f"data.train={write(tmp_path / 'rows.jsonl', [chat(2)])}")
    assert "the tokenizer's own chat template" in page and "data.train_on=assistant" in page
    assert "format messages, told from its rows" in page
    assert "prompts begin with '<|im_start|>' (no BOS); completions end with '<|im_end|>'" in page
    assert "  prompt    <|im_start|>user⏎\n            What is 2 and 2? Please. Please.<|im_end|>⏎\n" in page
    assert "  chosen    ‹It is 4.<|im_end|>›\n            9 tokens, all counted: " in page


def test_bad_dropped_and_cut_rows_are_shown_with_the_reason_and_what_a_run_would_do(model: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [BAD, chat(1), chat(2), {**chat(1), "rejected": chat(1)["chosen"]}])
    words = [model, f"data.train=[{{path: {path}, format: messages}}]", "data.max_length=70", "--rows", "5"]
    page = shown(*words, "data.truncation=error")
    assert f"1  {path}:1  bad row: rejected is missing" in page
    assert f"3  {path}:3  dropped: longer than data.max_length" in page
    assert f"4  {path}:4  bad row: chosen and rejected are identical" in page
    assert "of all 4: 1 pairs, 2 bad, 1 dropped" in page
    assert "a run stops at such rows (data.on_bad_row=error)" in page
    assert "a run stops at such rows (data.truncation=error)" in page
    assert "a run stops" not in shown(*words, "data.on_bad_row=skip")
    cut = shown(*words, "data.truncation=keep_end")
    assert "cut to data.max_length=70 (data.truncation=keep_end): tokens gone: " in cut and " of the prompt\n" in cut


def test_every_data_set_is_shown_with_its_name(model: str, tmp_path: Path):
    paths = [write(tmp_path / f"{name}.jsonl", [chat(n)]) for n, name in enumerate("abc")]
    words = [model, f"data.train=[{{path: {paths[0]}, name: first}}, {paths[1]}]", f"data.eval={paths[2]}"]
    page = shown(*words)
    assert "data.train[0]: first, " in page and f"data.train[1]: {paths[1]}, " in page
    assert f"data.eval: {paths[2]}, " in page
    assert [(row["data_set"], row["split"]) for row in objects(*words)] == [
        ("first", "train"), (paths[1], "train"), (paths[2], "eval")]


def pair_with_context() -> TokenizedPair:
    """A completion of "abc<|im_end|>" in which b is context."""
    ids = {c: tokenizer().convert_tokens_to_ids(c) for c in ("a", "b", "c", "<|im_end|>")}
    return TokenizedPair((ids["a"],), tuple(ids.values()), (ids["c"],), "f:1",
                         chosen_counts=(True, False, True, True), rejected_counts=None)


def page_of(pair: TokenizedPair, console: Console) -> None:
    config = compose(["model.path=m", "data.train=rows.jsonl"]).data
    page = Page(console, tokenizer(), config)
    look = Look(ReadReport("f", "messages"), [Trained(pair, pair, held_out=False)], seen=1)
    page.data_set("data.train", config.train[0], look)


def test_context_inside_a_completion_is_told_apart_with_and_without_colours():
    plain, coloured = io.StringIO(), io.StringIO()
    page_of(pair_with_context(), page_console(plain))
    assert "‹a›b‹c<|im_end|>›\n" in plain.getvalue() and "4 tokens, 3 counted" in plain.getvalue()
    page_of(pair_with_context(), Console(file=coloured, force_terminal=True, color_system="standard", width=80))
    green, dim, off = "\x1b[32m", "\x1b[2m", "\x1b[0m"
    assert f"{green}a{off}{dim}b{off}{green}c{off}\x1b[1;32m<|im_end|>{off}" in coloured.getvalue()
    assert "‹" not in coloured.getvalue()


def test_colours_are_for_terminals_whose_user_has_not_refused_them(monkeypatch: pytest.MonkeyPatch):
    class Window(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert page_console(Window()).is_terminal and not page_console(io.StringIO()).is_terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert not page_console(Window()).is_terminal


def test_what_is_not_seen_otherwise_is_made_visible():
    assert [piece.text for piece in visible([Piece(" a\nb\x1b[31m\u200b\u202e"), Piece("\xa0\tc  ")])] == [
        "␣a⏎\nb\\x1b[31m\\u200b\\u202e", "\\xa0\tc␣␣"]


def test_a_long_text_is_shown_by_its_ends_and_keeps_what_counts():
    pieces = [Piece("x" * 2000), Piece("<end>", counted=True, special=True)]
    short = shortened(pieces)
    assert short[0] == Piece("x" * 600) and short[-1] == pieces[1] and short[-2] == Piece("x" * 595)
    assert short[1].note and "805 more" in short[1].text
    assert shortened(pieces[1:]) == pieces[1:]


def test_a_space_at_the_start_of_a_completion_is_kept_by_tokenizers_that_drop_a_first_one():
    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<s>": 2}, unk_token="<s>"))
    core.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    assert spaced.decode([1]) == "b" and decode(spaced, [1], before=[0]) == " b"
    pieces = pieces_of(spaced, [1, 0, 1], [0], [True, False, True])
    assert [piece.text for piece in pieces] == [" b", " a", " b"]


# ------------------------------------------------------------------------------------------ it reads what it shows


def test_a_character_of_several_tokens_is_whole_where_the_text_before_ends_with_another():
    core = Tokenizer(models.BPE({"a": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    letters = PreTrainedTokenizerFast(tokenizer_object=core)
    before, ids = (letters(text)["input_ids"] for text in ("a\u5317", "\u4eaca"))
    assert len(before) == len(ids) == 4 and decode(letters, ids, before) == "\u4eaca"
    assert [p.text for p in pieces_of(letters, ids, before, [True] * 3 + [False])] == ["\u4eac", "a"]


def test_the_longest_and_a_random_pair_are_of_the_first_2000_rows(tmp_path: Path):
    rows = [{"prompt_ids": [5], "chosen_ids": [7] * (1 + n % 50), "rejected_ids": [8]} for n in range(2100)]
    rows[1500]["chosen_ids"], rows[2050]["chosen_ids"] = [7] * 60, [7] * 70
    path = write(tmp_path / "ids.jsonl", rows)
    seen = look(path)
    assert seen.seen == 2000 and not seen.whole
    assert seen.longest is not None and seen.longest[0] == 1501
    randoms = [found.random for found in (look(path, seed=seed) for seed in (0, 0, 1, 2))]
    assert randoms[0] == randoms[1] and len({number for number, _ in filter(None, randoms)}) > 1
    assert all(number > 3 for number, _ in filter(None, randoms))


def test_a_file_of_bad_rows_alone_is_not_read_to_its_end(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    write(path, [{"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8]}])
    path.write_text(path.read_text() + "{broken\n" * 5000)
    seen = look(str(path))
    assert (seen.seen, seen.pairs, seen.report.rows) == (2000, 1, 2000)


def test_rows_before_a_broken_place_are_shown_and_the_error_comes_only_to_who_reaches_it(
        tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([chat(n) for n in range(4)])[:-1] + ", {broken")
    words = [model, f"data.train={path}"]
    assert len(objects("--rows", "3", *words)) == 3
    page = shown(*words, code=2)
    assert "It is 4." in page and "  of the first " in page
    assert "broken JSON after row 4" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_rows_alone_leaves_nothing_behind_and_waits_for_no_torch(model: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [chat(n) for n in range(4)])
    (tmp_path / "here").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "show", "--json", "--rows=2", model,
                           f"data.train={path}"], cwd=tmp_path / "here", capture_output=True,
                          text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONPROFILEIMPORTTIME":
                                                                    "1"})
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["where"] for line in done.stdout.splitlines()] == [f"{path}:1", f"{path}:2"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "transformers" in imported and not imported & {"torch", "deepspeed", "dpo_dist.models.load"}
    assert not [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words, message", [
    (["--rows", "0"], "--rows takes a whole number greater than 0"),
    (["--rows"], "--rows takes a whole number"),
    (["--row=3"], "unknown option '--row=3'"),
    (["data.trian=x"], "did you mean 'data.train'"),
])
def test_a_mistake_in_the_command_is_one_message(words: list[str], message: str, model: str,
                                                 capsys: pytest.CaptureFixture[str]):
    assert cli.main(["show", model, *words]) == 2
    assert message in capsys.readouterr().err


def test_data_that_is_not_there_or_needs_a_tokenizer_is_one_message(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]):
    (tmp_path / "m").mkdir()
    for words, message in ((["data.train=nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
                           ([f"data.train={write(tmp_path / 'rows.jsonl', [chat(1)])}"], "text needs a tokenizer"),
                           ([], "data.train=[] names no data")):
        shown(f"model.path={tmp_path / 'm'}", *words, code=2)
        assert message in capsys.readouterr().err


def test_help_says_what_comes(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["show", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--rows N", "--json", "chosen_counts", "dropped", "data.train_on"))
