"""Tokenized pairs on disk: what goes in comes out, content alone names a store, and a half-written one is never
read."""
from __future__ import annotations

import datetime
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig, DatasetConfig
from dpo_dist.data import prepare as prepare_module
from dpo_dist.data import rows as rows_module
from dpo_dist.data import writer
from dpo_dist.data.prepare import prepare
from dpo_dist.data.store import PairStore
from dpo_dist.data.summary import summary_lines
from dpo_dist.types import TokenizedPair


def row(prompt: list[int], chosen: list[int], rejected: list[int], **more: object) -> dict:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


def random_rows(n: int, prompts: int | None = None) -> list[dict]:
    r = random.Random(n)

    def ids(longest: int) -> list[int]:
        return [r.randrange(100) for _ in range(r.randint(1, longest))]

    heads = [ids(9) + [i] for i in range(100, 100 + (prompts or n))]
    return [row(heads[i % len(heads)], ids(7) + [1], ids(7) + [2]) for i in range(n)]


def write(path: Path, rows: list[dict]) -> DatasetConfig:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return DatasetConfig(str(path))


def config(tmp_path: Path, *train: DatasetConfig, **changes: object) -> DataConfig:
    defaults = DataConfig(train=train, eval=(), eval_fraction=0.0, max_length=1000, truncation="drop",
                          on_bad_row="error", on_missing_content="error",
                          train_on="assistant", chat_template_kwargs=None, chat_template=None, group_by_prompt=False,
                          cache_dir=str(tmp_path / "cache"))
    return DataConfig(**{**vars(defaults), **changes})


def build(tmp_path: Path, rows: list[dict], name: str = "rows.jsonl", **changes: object) -> PairStore:
    return prepare(config(tmp_path, write(tmp_path / name, rows), **changes), None, None)[0]


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
                                merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=template)


def prompts(store: PairStore) -> set[tuple[int, ...]]:
    return {store[i].prompt_ids for i in range(len(store))}


# ------------------------------------------------------------------------------------------------------- what it holds


def test_pairs_come_out_as_they_went_in(tmp_path):
    rows = [row([5, 6], [7, 1], [8], strength=0.5, weight=2.0), row([9], [2], [2**31 - 1, 0])]
    store = build(tmp_path, rows)
    name = str(tmp_path / "rows.jsonl")
    assert len(store) == 2 and store[0] == TokenizedPair((5, 6), (7, 1), (8,), f"{name}:1", name, 0.5, 2.0)
    assert store[1] == TokenizedPair((9,), (2,), (2**31 - 1, 0), f"{name}:2", name)
    assert [part.tolist() for part in store.parts(0)] == [[5, 6], [7, 1], [8]]
    with pytest.raises(IndexError):
        store[2]


def test_what_counts_comes_out_as_it_went_in(tmp_path, monkeypatch):
    r = random.Random(0)
    rows = random_rows(40)
    for i, item in enumerate(rows):
        for side in ("chosen", "rejected")[:i % 3]:
            n = len(item[f"{side}_ids"])
            item[f"{side}_counts"] = [0, 1, 0] if n == 3 else [r.randrange(2) for _ in range(n - 1)] + [1]
    rows.append(row([1], [2, 3, 4], [5, 6], chosen_counts=[True, False, False], rejected_counts=[False, True]))
    monkeypatch.setattr(writer, "FLUSH_PAIRS", 3)
    store = build(tmp_path, rows)
    for i, item in enumerate(rows):
        for side, found, counted in zip(("chosen", "rejected"), (store[i].chosen_counts, store[i].rejected_counts),
                                        store.counted()[i], strict=True):
            counts = item.get(f"{side}_counts", [1] * len(item[f"{side}_ids"]))
            assert found == (None if all(counts) else tuple(map(bool, counts)))
            assert counted == sum(counts)
    assert store.counted().dtype == np.int32


def test_where_every_token_counts_the_store_holds_nothing_for_it(tmp_path):
    store = build(tmp_path, random_rows(20))
    assert len(store.uncounted) == len(store.records) == 0 and store[3].chosen_counts is None and store[3].record == {}
    assert np.array_equal(store.counted(), store.lengths()[:, 1:])


def test_records_come_out_as_they_went_in_and_are_mapped(tmp_path, monkeypatch):
    records = [{}, {"tags": {"topic": "färöisch", "n": 1.5}}, {},
               {"annotators": [1, None, "x" * 1000], "b": 0, "a": True}]
    dated = {"judged": datetime.date(2024, 7, 26)}
    monkeypatch.setattr(writer, "FLUSH_PAIRS", 2)
    pair_writer = writer.PairWriter(tmp_path / "store", [writer.Source("s", "p", "token_ids")])
    for record in (*records, dated):
        pair_writer.add(TokenizedPair((1,), (2,), (3,), "x", record=record), 0, 0)
    pair_writer.close({})
    store = PairStore.open(tmp_path / "store")
    assert [store[i].record for i in range(len(store))] == [*records, {"judged": "2024-07-26"}]
    assert list(store[3].record) == ["annotators", "b", "a"] and isinstance(store.records.base, np.memmap)


def test_the_content_of_a_completion_is_its_tokens_and_what_counts_in_all_64_bits(tmp_path):
    def content(**more: object) -> list[int]:
        return build(tmp_path, [row([1], [2, 3, 4], [5, 6, 7], **more)]).content[0].tolist()

    plain, counted = content(), content(chosen_counts=[1, 0, 1])
    assert plain[::2] == counted[::2] and plain[1] != counted[1] != content(chosen_counts=[1, 1, 0])[1]
    assert plain == content(chosen_counts=[1, 1, 1])
    assert plain == [writer.hash64(np.array(part, "<i4").tobytes()) for part in ([1], [2, 3, 4], [5, 6, 7])]


def test_lengths_are_those_of_prompt_chosen_and_rejected(tmp_path):
    rows = random_rows(50)
    store = build(tmp_path, rows)
    assert store.lengths().dtype == np.int32
    assert store.lengths().tolist() == [[len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])]
                                        for r in rows]
    assert store.largest_id() == max(max(ids) for r in rows for ids in r.values())


def test_the_arrays_are_mapped_and_not_loaded(tmp_path):
    store = build(tmp_path, random_rows(50))
    assert all(isinstance(getattr(store, name).base, np.memmap) for name in writer.ARRAYS)


def test_writing_in_many_small_parts_gives_the_same_store(tmp_path, monkeypatch):
    rows = random_rows(50)
    whole = build(tmp_path, rows)
    monkeypatch.setattr(writer, "FLUSH_PAIRS", 3)
    monkeypatch.setattr(rows_module, "CHUNK_RECORDS", 7)
    parts = build(tmp_path, rows, cache_dir=str(tmp_path / "other"))
    assert parts.path != whole.path and parts.digest == whole.digest
    assert [parts[i] for i in range(50)] == [whole[i] for i in range(50)]


def test_stores_laid_end_to_end_with_their_offsets_moved_on_are_the_store_of_all(tmp_path):
    rows = [{**item, "chosen_counts": [0] * (len(item["chosen_ids"]) - 1) + [1], "tags": {"n": i}, "strength": i}
            for i, item in enumerate(random_rows(30))]
    first, second = build(tmp_path, rows[:13]), build(tmp_path, rows[13:])
    whole = build(tmp_path, rows)
    for name in writer.ARRAYS:
        moved = getattr(second, name)
        if name in writer.OFFSETS:
            moved = moved + len(getattr(first, writer.OFFSETS[name]))
        if name != "where":                      # lines of the second file are not those of the whole one
            assert np.array_equal(np.concatenate([getattr(first, name), moved]), getattr(whole, name)), name


def test_a_place_without_a_number_or_with_an_odd_one_comes_back_as_it_was(tmp_path):
    pair_writer = writer.PairWriter(tmp_path / "store", [writer.Source("s", "p", "token_ids")])
    places = ["rows.jsonl:12", "rows.json:row 3", "somewhere", "rows.jsonl:007", "7", "rows.jsonl:0"]
    for place in places:
        pair_writer.add(TokenizedPair((1,), (2,), (3,), place), 0, 0)
    pair_writer.close({})
    store = PairStore.open(tmp_path / "store")
    assert [store[i].where for i in range(len(places))] == places


# -------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_depends_on_content_and_not_on_where_it_came_from_or_what_else_is_known(tmp_path):
    rows = random_rows(20)
    tagged = [{**item, "tags": {"n": i}} for i, item in enumerate(rows)]
    assert (build(tmp_path, rows, "a.jsonl").digest == build(tmp_path, rows, "b.jsonl").digest
            == build(tmp_path, tagged, "c.jsonl").digest)


@pytest.mark.parametrize("change", [
    lambda rows: rows[3]["chosen_ids"].append(5), lambda rows: rows[3].update(weight=2.0),
    lambda rows: rows[3].update(strength=2), lambda rows: rows[3].update(chosen_counts=[1, 0, 1]),
    lambda rows: rows.reverse(), lambda rows: rows.pop(),
    lambda rows: rows[3]["prompt_ids"].append(rows[3]["chosen_ids"].pop(0)),
], ids=["token", "weight", "strength", "counts", "order", "number", "boundary"])
def test_the_digest_changes_with_any_change_of_what_is_trained_on(tmp_path, change):
    rows = random_rows(20)
    rows[3]["chosen_ids"] = [4, 5, 6]
    before = build(tmp_path, rows)
    change(rows)
    assert build(tmp_path, rows).digest != before.digest


# ----------------------------------------------------------------------------------------------------- found by content


def test_the_same_data_is_tokenized_once(tmp_path, monkeypatch):
    rows = random_rows(20)
    first = build(tmp_path, rows)
    monkeypatch.setattr(prepare_module, "build", lambda *_: pytest.fail("built again"))
    assert build(tmp_path, rows).path == first.path


def test_whatever_decides_the_tokens_makes_another_store(tmp_path):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + m.content + '<|end|>' }}{% endfor %}")
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    original = config(tmp_path, data)
    changed = [replace(original, **change) for change in (
        {"max_length": 900}, {"truncation": "keep_end"}, {"chat_template": "none"}, {"on_bad_row": "skip"},
        {"train": (replace(data, name="other"),)}, {"train": (replace(data, weight=2.0),)})]
    paths = [prepare(item, tokenizer, "one")[0].path for item in (original, *changed)]
    paths.append(prepare(original, tokenizer, "two")[0].path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "d"}')
    paths.append(prepare(original, tokenizer, "one")[0].path)
    assert len(set(paths)) == len(paths)


def test_a_template_file_with_other_text_makes_another_store(tmp_path):
    tokenizer = byte_tokenizer("{{ messages[-1].content }}")
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    found = []
    for turn in ("'<' + m.role + '>'", "m.role + ': '"):
        (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ " + turn
                                             + " + m.content + '<|end|>' }}{% endfor %}")
        found.append(prepare(config(tmp_path, data, chat_template=str(tmp_path / "chat.jinja")), tokenizer,
                             "one")[0].digest)
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------------- whole or not at all


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "FLUSH_PAIRS", 2)
    monkeypatch.setattr(rows_module, "CHUNK_RECORDS", 2)
    with pytest.raises(UserError, match=r"rows\.jsonl:6: chosen is empty"):
        build(tmp_path, [*random_rows(5), row([1], [], [2])])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_that_a_killed_process_left_half_written_is_not_read(tmp_path):
    rows = random_rows(5)
    whole = build(tmp_path, rows)
    folder = whole.path.parent
    folder.rename(folder.with_name(folder.name + ".tmp-1-dead"))
    (folder.with_name(folder.name + ".tmp-1-dead") / "train" / "meta.json").unlink()
    again = build(tmp_path, rows)
    assert again.path == whole.path and again.digest == whole.digest


def test_writers_that_race_all_end_with_the_one_store(tmp_path):
    data = write(tmp_path / "rows.jsonl", random_rows(300))
    with ThreadPoolExecutor(6) as pool:
        stores = [store for store, _ in pool.map(lambda _: prepare(config(tmp_path, data), None, None), range(6))]
    assert len({store.path for store in stores}) == len({store.digest for store in stores}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != prepare_module.DIGESTS] == [
        stores[0].path.parent.name]


# ------------------------------------------------------------------------------------------------------------ held out


def test_no_prompt_is_both_trained_on_and_held_out(tmp_path):
    rows = random_rows(400, prompts=100)
    train, held_out = prepare(config(tmp_path, write(tmp_path / "rows.jsonl", rows), eval_fraction=0.3), None, None)
    assert len(train) + len(held_out) == 400 and not prompts(train) & prompts(held_out)
    assert 60 < len(held_out) < 180


def test_what_is_held_out_does_not_depend_on_the_other_rows(tmp_path):
    rows = random_rows(200)
    _, some = prepare(config(tmp_path, write(tmp_path / "a.jsonl", rows[:100]), eval_fraction=0.3), None, None)
    _, more = prepare(config(tmp_path, write(tmp_path / "b.jsonl", rows[::-1]), eval_fraction=0.3), None, None)
    assert prompts(some) < prompts(more)


def test_prompts_that_truncation_cuts_differently_are_held_out_together(tmp_path):
    rows = [row([i, *range(50)], [7] * n, [8] * n) for i in range(100, 130) for n in (5, 9)]
    data = write(tmp_path / "rows.jsonl", rows)
    train, held_out = prepare(config(tmp_path, data, eval_fraction=0.5, max_length=56, truncation="keep_end"), None,
                              None)
    for part in (train, held_out):
        assert sum(1 for i in range(len(part)) if len(part[i].chosen_ids) == 5) * 2 == len(part) > 0


def test_held_out_pairs_with_a_training_prompt_are_counted(tmp_path):
    train_data = write(tmp_path / "train.jsonl", [row([1], [2], [3]), row([4], [5], [6])])
    eval_data = write(tmp_path / "held.jsonl", [row([4], [7], [8]), row([9], [7], [8])])
    _, held_out = prepare(config(tmp_path, train_data, eval=(eval_data,)), None, None)
    assert held_out.report["pairs_with_training_prompts"] == 1
    assert any("WARNING: 1 of these pairs have a prompt that is trained on" in line
               for line in summary_lines(held_out, "eval"))


def test_without_held_out_data_the_second_store_is_empty(tmp_path):
    _, held_out = prepare(config(tmp_path, write(tmp_path / "rows.jsonl", random_rows(3))), None, None)
    assert len(held_out) == 0 and held_out.lengths().shape == (0, 3) and held_out.largest_id() == -1
    assert summary_lines(held_out, "eval") == ["eval: 0 pairs, 0 tokens"]


def test_held_out_data_alone_will_do(tmp_path):
    train, held_out = prepare(config(tmp_path, eval=(write(tmp_path / "rows.jsonl", random_rows(3)),)), None, None)
    assert (len(train), len(held_out)) == (0, 3)


def test_holding_out_nothing_where_something_was_asked_for_is_an_error(tmp_path):
    data = write(tmp_path / "rows.jsonl", [row([1], [2], [3])])
    with pytest.raises(UserError, match=r"data\.eval_fraction=0\.001 holds out none of 1 pairs"):
        prepare(config(tmp_path, data, eval_fraction=0.001), None, None)
    with pytest.raises(UserError, match=r"data\.eval leaves no held-out pair: 1 row\(s\) read; longer than "
                                        r"data\.max_length: 1"):
        prepare(config(tmp_path, eval=(data,), max_length=1), None, None)


# ------------------------------------------------------------------------------------------------------------- reports


def test_sources_keep_their_names_and_weights(tmp_path):
    a = write(tmp_path / "a.jsonl", random_rows(3))
    b = write(tmp_path / "b.jsonl", random_rows(2))
    data = (DatasetConfig(a.path, name="first", weight=0.5), b)
    store, _ = prepare(config(tmp_path, *data), None, None)
    assert store.source.tolist() == [0, 0, 0, 1, 1] and store.source_weights == (0.5, 1.0)
    assert [store[i].source for i in (0, 4)] == ["first", b.path]


def test_two_sources_of_one_name_are_an_error(tmp_path):
    data = write(tmp_path / "a.jsonl", random_rows(3))
    with pytest.raises(UserError, match=r"data\.train\[1\]: another data set is called .* set a name"):
        prepare(config(tmp_path, data, data), None, None)


def test_a_cache_folder_that_cannot_be_made_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file/cache cannot be made"):
        build(tmp_path, random_rows(2), cache_dir=str(tmp_path / "file" / "cache"))


def test_nothing_is_lost_without_a_count(tmp_path):
    rows = [row([1, 2], [3, 4, 5], [6]), row([1, 2], [3, 4, 5], [6]), row([1, 2], [9], [6]), row([], [9], [6]),
            row([1] * 8, [2], [3]), row([1, 2], [3, 3, 3, 3], [4])]
    store = build(tmp_path, rows, max_length=5, truncation="keep_start", on_bad_row="skip")
    lines = summary_lines(store, "train")
    assert len(store) == 4 and store.report["duplicate_pairs"] == 1 and store.report["duplicate_prompts"] == 3
    name = tmp_path / "rows.jsonl"
    assert lines == [
        "train: 4 pairs, 22 tokens",
        f"  {name} (token_ids): 6 rows read, 4 pairs kept (1 truncated)",
        f"    bad: 1 × prompt is empty, e.g. {name}:4: prompt is empty",
        f"    dropped: 1 × no completion token left, e.g. {name}:5: 8 prompt tokens",
        "  tokens (median / p95 / max): prompt 2 / 2 / 2, chosen 3 / 3 / 3, rejected 1 / 1 / 1",
        "  chosen is longer than rejected in 75% of the pairs",
        "  repeated: 1 pairs (kept), 3 prompts",
    ]


def test_how_much_of_the_completions_counts_is_mentioned_where_it_is_not_all(tmp_path):
    rows = [row([1], [2, 3, 4], [5], chosen_counts=[1, 0, 1]), row([1], [2, 3], [5, 6])]
    lines = summary_lines(build(tmp_path, rows), "train")
    assert "  87.5% of the completions' tokens count; the others are context" in lines


def test_a_template_that_asks_for_the_date_is_mentioned(tmp_path):
    tokenizer = byte_tokenizer("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role + m.content + '<|end|>' }}{% "
                               "endfor %}")
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    store, _ = prepare(config(tmp_path, data), tokenizer, "one")
    assert summary_lines(store, "train")[-1].endswith("always gets 26 July 2024: tokens must not depend on the day")
