"""`dpo-dist audit`, alone and before a run: what it writes, what it stops, and that it does not look twice."""
from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, dpo_dist, eval_on, train_on, write_rows, write_tiny_llama

from dpo_dist.audit.reading import prompt_of
from dpo_dist.audit.tokens import Sample
from dpo_dist.types import PreferenceRow


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    """A model, rows of which one is repeated, and two held-out ones of which one is trained on as well."""
    write_tiny_llama(tmp_path / "m")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(rows[3]) + "\n")
    held_out = [*write_rows(tmp_path / "eval.jsonl", 1, seed=5), rows[7]]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return [f"model.path={tmp_path / 'm'}", *base, "zero=none", train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "eval.jsonl"), "train.max_steps=1", f"run.dir={tmp_path / 'run'}"]


def audit_json(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "audit.json").read_text())


def test_a_run_stops_before_anything_is_scored_where_a_finding_reaches_fail_on(words: list[str], tmp_path: Path):
    stopped = dpo_dist("run", *words, code=2)
    assert "audit.fail_on=error" in stopped.stderr and "leakage (error): 1 pairs" in stopped.stderr
    assert f"{tmp_path / 'rows.jsonl'}:8" in stopped.stderr and "set audit.fail_on=none" in stopped.stderr
    assert "leakage" in stopped.stdout and "duplicate_pair" in stopped.stdout, "the table has all findings"
    found = audit_json(tmp_path)
    assert [(entry["kind"], entry["severity"]) for entry in found["findings"]][:2] == [
        ("leakage", "error"), ("duplicate_pair", "warning")]
    assert {"kind", "severity", "count", "share", "examples", "meaning", "remedy"} <= found["findings"][0].keys()
    assert (found["rows"], found["pairs"]) == (15, 15)
    assert not (tmp_path / "run" / "data.txt").exists() and not (tmp_path / "reference").exists()

    went_on = dpo_dist("run", *words, "audit.fail_on=none")
    assert "were audited before" in went_on.stdout and audit_json(tmp_path) == found, "it does not look twice"
    assert (tmp_path / "run" / "DONE").exists()


def test_a_changed_row_is_audited_again_and_a_warning_may_stop_as_well(words: list[str], tmp_path: Path):
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:7] + rows[8:]))
    first = dpo_dist("audit", *words)
    assert "audited before" not in first.stdout and "1 warning" in first.stdout
    assert "duplicate_pair (warning)" in dpo_dist("audit", *words, "audit.fail_on=warning", code=2).stderr
    (tmp_path / "rows.jsonl").write_text("".join(rows[:7] + rows[8:-1]))
    assert "audited before" not in dpo_dist("audit", *words, "audit.fail_on=warning").stdout
    assert audit_json(tmp_path)["findings"] == []


def test_pairs_that_the_reference_has_scored_are_told_as_too_easy_or_hopeless(words: list[str], tmp_path: Path):
    """An answer that the reference itself gives, token by token, is far likelier than the others: as the chosen one it
    is too easy, as the rejected one hopeless."""
    import torch
    from transformers import AutoModelForCausalLM

    words = [word for word in words if not word.startswith("data.eval")]
    model, r = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), random.Random(0)

    def own_answer(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt):]

    def ids(n: int) -> list[int]:
        return [r.randrange(3, 64) for _ in range(n)]

    rows = [{"prompt_ids": ids(9), "chosen_ids": ids(40), "rejected_ids": ids(40)} for _ in range(50)]
    rows[5]["chosen_ids"] = own_answer(rows[5]["prompt_ids"])
    rows[9]["rejected_ids"] = own_answer(rows[9]["prompt_ids"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo_dist("audit", *words)
    assert "not looked at" in audit_json(tmp_path)["looked_at"]["reference (too_easy, hopeless)"]
    (tmp_path / "run" / "audit.json").unlink()
    dpo_dist("score", *words)
    dpo_dist("audit", *words)
    found = audit_json(tmp_path)
    assert "50 of 50 pairs" in found["looked_at"]["reference (too_easy, hopeless)"]
    assert {entry["kind"]: entry["examples"] for entry in found["findings"]} == {
        "too_easy": [f"{tmp_path / 'rows.jsonl'}:6"], "hopeless": [f"{tmp_path / 'rows.jsonl'}:10"]}


def test_the_audit_waits_for_no_torch(words: list[str]):
    program = ("import sys; from dpo_dist.audit.__main__ import audit; from dpo_dist.runtime.alone import run_alone; "
               "code = run_alone(sys.argv[1:], audit); assert 'torch' not in sys.modules, 'torch'; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", program, *words, "audit.fail_on=none"], cwd=REPO, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_several_processes_find_what_one_finds(words: list[str], tmp_path: Path):
    rows = write_rows(tmp_path / "large.jsonl", 2_000, vocabulary=50_000)
    with (tmp_path / "large.jsonl").open("a") as file:
        file.write(json.dumps(rows[0]) + "\n" + json.dumps(rows[1_999]) + "\n")
    words = [*(word for word in words if "data." not in word), train_on(tmp_path / "large.jsonl"),
             f"data.cache_dir={tmp_path / 'tokens'}"]
    program = ("import sys; from dpo_dist.audit import processes; processes.BYTES_A_PROCESS = 100_000; "
               "processes.usable_cores = lambda: frozenset(range(int(sys.argv[1]))); "
               "from dpo_dist.audit.__main__ import audit; from dpo_dist.runtime.alone import run_alone; "
               "sys.exit(run_alone(sys.argv[2:], audit))")
    found = []
    for cores in (1, 3):
        done = subprocess.run([sys.executable, "-c", program, str(cores), *words, f"run.dir={tmp_path / str(cores)}"],
                              cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads((tmp_path / str(cores) / "audit.json").read_text())
        found.append((said["pairs"], said["rows"], said["findings"], said["looked_at"]["rows and texts"]))
    assert found[0] == found[1]
    assert found[0][2][0]["examples"] == [f"{tmp_path / 'large.jsonl'}:{line}" for line in (2_001, 2_002)]


def test_a_benchmark_without_a_prompt_is_a_mistake_that_names_the_columns(words: list[str], tmp_path: Path):
    (tmp_path / "bench.jsonl").write_text('{"riddle": "x", "answer": "y"}\n')
    path = tmp_path / "bench.jsonl"
    shown = dpo_dist("audit", *words, f"audit.against=[{{path: {path}}}]", code=2).stderr
    assert "has no prompt (fields: riddle, answer)" in shown and "columns: {prompt: my_column}" in shown
    dpo_dist("audit", *words, f"audit.against=[{{path: {path}, columns: {{prompt: riddle}}}}]", "audit.fail_on=none")


def test_the_sample_that_is_tokenized_depends_on_content_alone_and_long_texts_bound_it():
    def row(at: int, chars: int = 10) -> PreferenceRow:
        return PreferenceRow("p" * chars, "c", "r", f"rows:{at}")

    def sample(order: list[int], rows: int, chars: int, long: int = 10) -> list[str]:
        taken = Sample(rows, chars)
        for at in order:
            taken.offer((at * 7919) % 1000, row(at, long), at)
        return sorted(chosen.where for chosen, _ in taken.rows())

    assert sample(list(range(100)), 10, 10_000) == sample(list(range(99, -1, -1)), 10, 10_000)
    assert len(sample(list(range(100)), 10, 10_000)) == 10
    assert len(sample(list(range(100)), 50, 100_000, long=30_000)) == 3


def test_prompts_are_found_in_benchmarks():
    assert prompt_of({"id": 3, "question": "Why?"}) == "Why?" and prompt_of({"a": 1}) is None
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert prompt_of({"messages": chat}) == "Hi"
