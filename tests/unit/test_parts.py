"""Stores that several processes build in parts: the bytes, the reports and the errors of one process alone."""
from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_store import byte_tokenizer, config, random_rows, row

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data import rows as rows_module
from dpo_dist.data.parts import begin_parts, join_parts, records_done, write_part
from dpo_dist.data.prepare import open_stores, prepare
from dpo_dist.data.rows import Share
from dpo_dist.data.tokenize import PairTokenizer
from dpo_dist.runtime.checksums import CHECKSUMS

TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|end|>' }}{% endfor %}" \
           "{% if add_generation_prompt %}<assistant>{% endif %}"
SIZES = [1, 2, 7]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CHUNK_RECORDS", 5)


def in_parts(settings: DataConfig, folder: Path, parts: int, tokenizer: object = None, backwards: bool = True) -> Path:
    """The folder of the stores that so many parts gave; the last part is written first."""
    encoder = PairTokenizer.of(tokenizer, settings)
    begin_parts(folder, parts)
    for part in range(parts)[::-1] if backwards else range(parts):
        write_part(settings, encoder, Share(part, parts), folder)
    join_parts(settings, encoder, folder, parts)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*")
            if file.is_file() and file.name != CHECKSUMS}          # which a folder has once it has its name


def assert_same(settings: DataConfig, tmp_path: Path, tokenizer: object = None) -> None:
    """Any number of parts gives what one process gives alone, and nothing else is left."""
    alone = content(prepare(settings, tokenizer, "tokenizer")[0].path.parent)
    for parts in SIZES:
        assert content(in_parts(settings, tmp_path / f"{parts}-parts", parts, tokenizer)) == alone


def jsonl(path: Path, rows: list[dict]) -> DatasetConfig:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return DatasetConfig(str(path))


def chats(n: int, seed: int = 0) -> list[dict]:
    r = random.Random(seed)

    def said() -> str:
        return "".join(r.choice("abcde ") for _ in range(r.randint(1, 60))) + "."

    return [{"prompt": [{"role": "user", "content": said()}], "chosen": [{"role": "assistant", "content": said()}],
             "rejected": [{"role": "assistant", "content": said()}]} for _ in range(n)]


@pytest.mark.parametrize("n", [1, 4, 5, 6, 25, 64])
def test_parts_give_the_bytes_of_one_process(n: int, tmp_path: Path):
    assert_same(config(tmp_path, jsonl(tmp_path / "rows.jsonl", chats(n))), tmp_path, byte_tokenizer(TEMPLATE))


def test_parts_of_several_data_sets_with_held_out_pairs_give_the_bytes_of_one_process(tmp_path: Path):
    rows = random_rows(83, prompts=40)
    for i, weight in enumerate((0.5, 2.0, 1.0)):
        rows[i * 11]["weight"], rows[i * 9]["strength"] = weight, i
    one, two = jsonl(tmp_path / "one.jsonl", rows), jsonl(tmp_path / "two.jsonl", random_rows(31))
    settings = config(tmp_path, one, two, eval=(jsonl(tmp_path / "eval.jsonl", rows[20:33]),), eval_fraction=0.3,
                      max_length=14, truncation="keep_start")
    assert_same(settings, tmp_path)
    train, held_out = open_stores(tmp_path / "2-parts")
    assert len(train) and len(held_out) and train.report["sources"][0]["tokens"]["truncated"]
    assert held_out.report["pairs_with_training_prompts"]


def test_parts_of_a_folder_name_the_files_in_the_order_of_one_process(tmp_path: Path):
    (tmp_path / "rows").mkdir()
    for name, n in (("a.jsonl", 13), ("b.jsonl", 2), ("c.jsonl", 18)):
        jsonl(tmp_path / "rows" / name, random_rows(n))
    assert_same(config(tmp_path, DatasetConfig(str(tmp_path / "rows"))), tmp_path)


def as_csv(path: Path, rows: list[dict]) -> None:
    quoted = ["\"{}\",\"{}\",\"{}\"".format(*(row[key][0]["content"] for key in row)) for row in rows]
    path.write_text("prompt,chosen,rejected\n" + "\n".join(line.replace(" ", "\n", 1) for line in quoted))


KINDS: dict[str, Callable[[Path, list[dict]], object]] = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n \n".join(map(json.dumps, rows)).encode())),
    "rows.csv": as_csv,
    "rows.parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path,
                                                                   row_group_size=7),
}


@pytest.mark.parametrize("name", KINDS)
def test_parts_read_every_kind_of_file_as_one_process_does(name: str, tmp_path: Path):
    KINDS[name](tmp_path / name, chats(33))
    assert_same(config(tmp_path, DatasetConfig(str(tmp_path / name))), tmp_path, byte_tokenizer(TEMPLATE))


def answered(n: int) -> list[dict]:
    """KTO's rows: of each prompt some good and some bad answers, in no order."""
    r = random.Random(n)
    return [{"prompt": f"question {r.randint(0, n // 4)}", "completion": f"answer {i}", "label": r.random() < 0.5,
             "chosen_model": f"model {i}"} for i in range(n)]


def test_parts_of_rows_that_depend_on_others_give_the_bytes_of_one_process(tmp_path: Path):
    """Pairs that are made of two rows, samples by content, columns of other names."""
    several = [{**chat, "question": chat.pop("prompt"), "tags": ["a", i]} for i, chat in enumerate(chats(40, seed=1))]
    asked = DatasetConfig(jsonl(tmp_path / "asked.jsonl", several).path, columns={"prompt": "question"}, rows=23)
    settings = config(tmp_path, jsonl(tmp_path / "kto.jsonl", answered(60)), asked)
    assert_same(settings, tmp_path, byte_tokenizer(TEMPLATE))
    kto, sampled = (source["read"] for source in open_stores(tmp_path / "2-parts")[0].report["sources"])
    assert sampled["pairs"] == 23 and kto["pairs"] > 5 and kto["no_pair"] and kto["rows"] == 60


def test_parts_keep_what_counts_and_what_is_known_of_a_judgment(tmp_path: Path):
    talks = [{**chat, "chosen": [*chat["chosen"], *chat["prompt"], *chat["rejected"]], "tags": {"n": i},
              "chosen_rating": i % 5, "rejected_rating": 0} for i, chat in enumerate(chats(33))]
    talks[4]["chosen"][0]["reasoning_content"] = talks[30]["chosen"][0]["reasoning_content"] = "left out"
    settings = config(tmp_path, jsonl(tmp_path / "rows.jsonl", talks), on_missing_content="warn")
    assert_same(settings, tmp_path, byte_tokenizer(TEMPLATE))
    train = open_stores(tmp_path / "7-parts")[0]
    assert train[7].record["tags"] == {"n": 7} and not all(train[7].chosen_counts)
    [left_out] = train.report["sources"][0]["tokens"]["left_out"]["counts"].values()
    assert left_out == 2


def test_a_column_that_only_one_part_has_is_there_and_one_that_none_has_is_an_error(tmp_path: Path):
    rows = [{"q": chat["prompt"], **chat} for chat in chats(12)]
    rows[7]["w"] = 2.0
    data = DatasetConfig(jsonl(tmp_path / "rows.jsonl", rows).path, columns={"prompt": "q", "weight": "w"})
    assert_same(config(tmp_path, data), tmp_path, byte_tokenizer(TEMPLATE))
    absent = config(tmp_path, DatasetConfig(data.path, columns={"prompt": "q", "weight": "x"}))
    with pytest.raises(UserError, match="columns names 'x', which no row"):
        in_parts(absent, tmp_path / "absent", 2, byte_tokenizer(TEMPLATE))


def test_parts_report_bad_rows_as_one_process_does(tmp_path: Path):
    rows = random_rows(60)
    for i in (3, 9, 14, 22, 40, 41):
        rows[i] = row([1], [], [2])
    rows[30], rows[7], rows[59] = row([], [1], [2]), row([4] * 2000, [1], [2]), row([1], [5], [5])
    data = jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("\n", "\n{broken\n", 1))
    assert_same(config(tmp_path, data, on_bad_row="skip"), tmp_path)
    report = open_stores(tmp_path / "7-parts")[0].report["sources"][0]
    assert report["read"]["bad"]["counts"] == {"broken JSON line": 1, "chosen is empty": 6, "prompt is empty": 1,
                                               "chosen and rejected are identical": 1}
    assert [text.split(":")[1] for text in report["read"]["bad"]["examples"]["chosen is empty"]] == ["5", "11", "16"]


def mistakes(tmp_path: Path, name: str) -> tuple[DataConfig, object]:
    """A configuration with a mistake of this kind, and its tokenizer."""
    rows, tokenizer, changes = random_rows(60), None, {}
    if name == "bad rows":
        rows[57] = rows[12] = row([1], [], [2])
        rows[8] = row([], [1], [2])
    elif name == "too long rows":
        rows[44] = rows[21] = rows[38] = row([4] * 2000, [1], [2])
        changes = {"truncation": "error"}
    elif name == "a too long row before a bad one":
        rows[21], rows[22], rows[40] = row([4] * 2000, [1], [2]), row([1], [], [2]), row([1], [], [2])
        rows[22:22] = random_rows(6)
        changes = {"truncation": "error"}
    elif name == "a too long row after a bad one":
        rows[21], rows[40] = row([1], [], [2]), row([4] * 2000, [1], [2])
        changes = {"truncation": "error"}
    elif name in ("rows that the template refuses", "a format that cannot be told"):
        rows, refuses = chats(60), "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
        tokenizer = byte_tokenizer(refuses + TEMPLATE)
        for i in (33, 51):
            rows[i]["prompt"][0]["content"] = f"bad {i}"
        if name == "a format that cannot be told":
            rows[0] = {"question": "?"}
    elif name == "no rows":
        rows = []
    elif name == "nothing to hold out":
        changes = {"eval_fraction": 1e-9}
    data = jsonl(tmp_path / "rows.jsonl", rows)
    second = jsonl(tmp_path / "second.jsonl", [*random_rows(20), row([1], [], [2])])
    if name == "a damaged file":
        (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes())[:-30])
        data = DatasetConfig(str(tmp_path / "rows.jsonl.gz"))
    elif name == "a mistake in the second data set":
        return config(tmp_path, data, second), None
    elif name == "bad rows in both data sets":
        rows[50] = row([], [1], [2])
        return config(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), second), None
    return config(tmp_path, data, **changes), tokenizer


@pytest.mark.parametrize("name", ["bad rows", "too long rows", "a too long row before a bad one", "no rows",
                                  "a too long row after a bad one", "rows that the template refuses", "a damaged file",
                                  "a format that cannot be told", "nothing to hold out",
                                  "a mistake in the second data set", "bad rows in both data sets"])
def test_parts_fail_with_the_message_of_one_process(name: str, tmp_path: Path):
    settings, tokenizer = mistakes(tmp_path, name)
    with pytest.raises(UserError) as alone:
        prepare(settings, tokenizer, "tokenizer")
    for parts in SIZES:
        for backwards in (False, True):
            with pytest.raises(UserError) as raised:
                in_parts(settings, tmp_path / f"{parts}-{backwards}", parts, tokenizer, backwards)
            assert str(raised.value) == str(alone.value)


def test_parts_tell_how_many_records_they_have_done(tmp_path: Path):
    settings = config(tmp_path, jsonl(tmp_path / "rows.jsonl", random_rows(33)))
    encoder = PairTokenizer.of(None, settings)
    begin_parts(tmp_path / "temporary", 3)
    assert records_done(tmp_path / "temporary", 3) == 0
    for part, done in ((1, 10), (0, 23), (2, 33)):
        write_part(settings, encoder, Share(part, 3), tmp_path / "temporary")
        assert records_done(tmp_path / "temporary", 3) == done
