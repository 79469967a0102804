"""Whatever a data file holds, it gives pairs, bad rows that are counted, or one message: never another error."""
from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutated import NAMES, ROWS, SUFFIXES, changed_bytes, changed_row, file_of, json_text
from row_files import read

from dpo_dist.config.errors import UserError
from dpo_dist.data.rows import ReadReport
from dpo_dist.types import PreferenceRow, TokenizedPair

some = settings(deadline=None, derandomize=True, database=None, max_examples=60,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
texts = st.text(st.characters(exclude_categories=[]), max_size=6) | st.sampled_from(["user", "assistant", "tie"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=4),
    max_leaves=12)


def told(path: Path, format: str) -> ReadReport | None:
    """What became of the rows, where they were read as they must be; None for one message."""
    try:
        rows, report = read(path, format, "skip")
    except UserError as error:
        str(error).encode()
        return None
    assert all(isinstance(row, PreferenceRow | TokenizedPair) for row in rows)
    assert len(rows) == report.pairs and report.rows
    json.dumps([row.record for row in rows], allow_nan=False, ensure_ascii=False).encode()
    "".join(line for lines in report.bad.examples.values() for line in lines).encode()
    return report


@some
@given(format=st.sampled_from([*ROWS, "auto"]), records=st.lists(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=6) | values, min_size=1, max_size=3))
def test_any_json_is_read_or_told(tmp_path: Path, format: str, records: list[Any]):
    (tmp_path / "rows.jsonl").write_text("".join(json_text(record) + "\n" for record in records))
    report = told(tmp_path / "rows.jsonl", format)
    assert report is None or report.rows >= len(records)


@pytest.mark.parametrize("format", ROWS)
def test_a_changed_row_of_every_format_is_read_or_told(tmp_path: Path, format: str):
    for seed in range(40):
        random = Random(f"{format} {seed}")
        rows = [changed_row(random.choice(ROWS[format]), random) for _ in range(3)]
        (tmp_path / "rows.jsonl").write_bytes(file_of(rows, ".jsonl"))
        for read_as in (format, "auto"):
            told(tmp_path / "rows.jsonl", read_as)


@pytest.mark.parametrize("suffix", sorted(set(SUFFIXES)))
def test_a_damaged_file_of_every_kind_is_read_or_told(tmp_path: Path, suffix: str):
    path = tmp_path / f"rows{suffix}"
    for seed in range(30 if suffix == ".parquet" else 60):
        random = Random(f"{suffix} {seed}")
        path.write_bytes(changed_bytes(file_of(ROWS[random.choice(list(ROWS))] * 2, suffix), random))
        told(path, "auto")


@pytest.mark.parametrize("format", ROWS)
def test_the_rows_that_are_changed_are_good_ones(tmp_path: Path, format: str):
    (tmp_path / "rows.jsonl").write_bytes(file_of(ROWS[format], ".jsonl"))
    rows, report = read(tmp_path / "rows.jsonl", format, "error")
    assert rows and not report.bad.counts


def test_a_half_of_a_character_in_a_free_column_or_a_name_is_kept_as_text_that_files_take(tmp_path: Path):
    row = {**ROWS["preference"][0], "group": "a\ud83d", "\ud83d": 1, "annotator": "\udc00"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"\ud83d": 1}) + "\n")
    (only,), report = read(tmp_path / "rows.jsonl", "preference", "skip")
    assert only.record["columns"]["group"] == "a\\ud83d" and only.record["annotator"] == "\\udc00"
    assert report.bad.examples["prompt is missing"] == [f"{tmp_path}/rows.jsonl:2: prompt is missing (fields: \\ud83d)"]


@pytest.mark.parametrize("after", ["{}", " \n{}", "\n" * 3_000_000 + "]"])
def test_what_follows_a_list_is_not_left_out_without_a_word(tmp_path: Path, after: str):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS["preference"]) + after)
    with pytest.raises(UserError, match=r"rows.json:1: more follows after the list's end, after row 1; mend the file"):
        read(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS["preference"]) + " \n\n")
    assert len(read(tmp_path / "rows.json")[0]) == 1


@pytest.mark.parametrize("number", [1e39, -1e300, 10**400, float("inf"), "1e39"])
def test_a_number_that_would_be_kept_as_infinite_is_a_bad_row(tmp_path: Path, number: Any):
    for key in ("weight", "margin"):
        row = {"prompt": "Two?", "chosen": "Two.", "rejected": "One.", key: number}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        assert list(read(tmp_path / "rows.jsonl", "preference", "skip")[1].bad.counts) == [f"{key} is not a number"]
