"""Inputs from the public that came out wrong or were refused, as `dpo-dist show` reads them. They lie outside the
repository."""
from __future__ import annotations

import io
import json
import os
import runpy
from pathlib import Path

import pytest
from conftest import REPO

from dpo_dist.show.__main__ import main

CASES = Path(os.environ.get("DPO_DIST_SHARED", REPO.parent / "shared")) / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is missing; set DPO_DIST_SHARED to the folder "
                                                           "above it")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    runpy.run_path(str(CASES / "make.py"))["main"](folder)
    return folder


def shown(models: Path, model: str, rows: str, *words: str) -> list[dict]:
    out = io.StringIO()
    assert main(["--json", f"model.path={models / model}", f"data.train={CASES / 'rows' / rows}", *words], out) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("model, rows, row, reason, detail", [
    ("default_system", "devrole.jsonl", 0, "leaves out content of developer turns", "prompt turn 1"),
    ("default_system", "reason.jsonl", 0, "leaves out reasoning_content of assistant turns", "chosen turn 1"),
    ("strips_thinking", "thinkstrip.jsonl", 0, "leaves out content of assistant turns", "chosen turn 1"),
    ("strips_thinking", "thinkstrip.jsonl", 1, "leaves out content of assistant turns", "chosen turn 1"),
    ("writes_bos", "rendered.jsonl", 0, "data.chat_template=none", "prompt holds"),
    ("default_system", "firstnull.jsonl", 0, "rejected is missing", ""),
])
def test_a_row_that_would_come_out_wrong_is_refused(models: Path, model: str, rows: str, row: int, reason: str,
                                                    detail: str):
    found = shown(models, model, rows)[row]
    assert reason in found["dropped"] and detail in found["detail"]


def test_a_rendered_text_without_a_template_is_taken_as_it_is(models: Path):
    [row] = shown(models, "writes_bos", "rendered.jsonl", "data.chat_template=none")
    assert row["prompt"] == "<|bos|><|user|>Weather?<|assistant|>" and row["chosen"] == "Sunny.<|eot|>"


def test_a_tables_nulls_change_no_token(models: Path):
    plain, padded = (shown(models, "thinking", rows, "data.on_missing_content=warn")
                     for rows in ("tools.jsonl", "tools_nulls.jsonl"))
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [row[name] for row in plain] == [row[name] for row in padded]
    assert "null" not in padded[1]["prompt"] + padded[1]["chosen"]


def test_the_named_template_renders_rows_with_tools(models: Path):
    named, alone = (shown(models, model, "tools.jsonl")[1] for model in ("named_templates", "thinking"))
    assert named["prompt"] == alone["prompt"] and '"name": "clock"' in named["prompt"]


@pytest.mark.parametrize("rows", ["tagslist.jsonl", "mixstr.jsonl", "firstnull.jsonl"])
def test_a_row_that_says_plainly_what_it_is_is_read(models: Path, rows: str):
    last = shown(models, "default_system", rows)[-1]
    assert (last["chosen"], last["rejected"]) == ("Sunny.<|im_end|>", "Rain.<|im_end|>")
