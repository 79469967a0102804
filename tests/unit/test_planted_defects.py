"""Whether `dpo-dist audit` finds what was planted, in a clean synthetic set and in two real ones, and nothing else.

The defects come from tests/planted.py, which knows nothing of how the audit looks for them.
"""
from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
from clean_rows import clean_rows
from conftest import REPO, dpo_dist
from made_tokenizers import CHATML
from planted import KINDS, Options, Planted, plant, plant_all, token_faults
from row_layouts import Row
from unigram_model import write_tokenizer, write_unigram_model

SHARED = Path(os.environ.get("DPO_DIST_SHARED", REPO.parent / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here; set DPO_DIST_SHARED")
FILES = {"texts": 1000, "messages": 400, "argilla": 400, "helpsteer": 200}     # layouts of the clean control's rows
MAX_LENGTH = 1024                            # tokens, and of a real set's ...
LONGEST = 4096                               # ... whose words our tokenizer cuts small
FOUND = 0.95                                 # of what was planted, at least
ALARMS = ("warning", "error")


# Of rows against others, of judgments and of texts, each in the file whose layout holds it.
PLANTED: dict[str, dict[str, int]] = {
    "texts": {"duplicate_pair": 20, "near_duplicate_prompt": 20, "contradiction": 16, "preference_cycle": 8,
              "leakage": 20, "identical_completions": 15, "truncation_loss": 12, "empty_reasoning": 18},
    "messages": {"special_tokens_in_text": 18, "language_mix": 20},
    "argilla": {"tie": 20, "both_bad": 15, "annotator_disagreement": 30},
}


@dataclass(frozen=True)
class Audit:
    findings: Mapping[str, dict[str, Any]]
    whole: dict[str, Any]

    @property
    def alarms(self) -> dict[str, int]:
        return {kind: f["count"] for kind, f in self.findings.items() if f["severity"] in ALARMS}

    def lines(self, kind: str, name: str) -> set[int]:
        """The lines of a file that the examples of a finding name."""
        said = json.dumps(self.findings[kind]["examples"])
        return {int(line) for line in re.findall(rf"{re.escape(name)}:(?:row )?(\d+)", said)}


# -------------------------------------------------------------------------------------------------------- the clean set


def test_the_clean_set_asks_every_prompt_once_and_tells_nothing_of_the_judgment():
    rows, held_out = clean_rows(2000), clean_rows(200, seed=1)
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == len(rows) and not prompts & {row["prompt"] for row in held_out}
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    marked = {side: sum(any(mark in row[side] for mark in ("**", "##", "\n-", "\n1.")) for row in rows)
              for side in ("chosen", "rejected")}
    assert abs(longer / len(rows) - 0.5) < 0.035         # three standard deviations
    assert marked["chosen"] > 300 and abs(marked["chosen"] - marked["rejected"]) < 90
    shingles = [{tuple(words[i:i + 3]) for i in range(len(words) - 2)}
                for words in (row["prompt"].lower().split() for row in rows[:700])]
    assert max(len(a & b) / len(a | b) for a, b in combinations(shingles, 2)) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_defect_stands_where_it_is_said_to(kind: str):
    rows = clean_rows(60)
    planted, places = plant(rows, kind, 7, random.Random(0), Options(held_out=clean_rows(40, seed=1)))
    again, _ = plant(rows, kind, 7, random.Random(0), Options(held_out=clean_rows(40, seed=1)))
    assert planted == again and len(places.rows) >= 7
    if len(planted) > len(rows):                         # rows were added, all others are as they were
        assert [row for i, row in enumerate(planted) if i not in places.rows] == rows


# ----------------------------------------------------------------------------------------------------------- the audits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a config; no weights are needed to look at data."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, texts_of(clean_rows(200)), CHATML)
    return folder


def texts_of(rows: Sequence[Row]) -> list[str]:
    return [row[key] for row in rows for key in ("prompt", "chosen", "rejected")]


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def audit(run: Path, model: Path, files: Sequence[Path], *words: str, held_out: Path | None = None,
          max_length: int = MAX_LENGTH) -> Audit:
    entries = ", ".join(f"{{path: {file}, name: {file.stem}}}" for file in files)
    evaluated = [f"data.eval=[{{path: {held_out}}}]"] if held_out else []
    dpo_dist("audit", f"data.train=[{entries}]", f"model.path={model}", f"run.dir={run}", "audit.fail_on=none",
             f"data.max_length={max_length}", f"data.cache_dir={run / 'tokens'}", "data.on_bad_row=skip",
             "cluster.device=cpu", "model.dtype=fp32", *evaluated, *words)
    whole = json.loads((run / "audit.json").read_text())
    return Audit({finding["kind"]: finding for finding in whole["findings"]}, whole)


def clean_files() -> dict[str, list[Row]]:
    """{layout: rows} of the clean control, before they are written in that layout: four sources, 2,000 rows."""
    rows = iter(clean_rows(sum(FILES.values())))
    return {layout: list(islice(rows, n)) for layout, n in FILES.items()}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Audit:
    """The audit of the clean set."""
    return audit_of({}, tmp_path_factory.mktemp("control"), model)[0]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Audit, dict[str, Planted]]:
    """One audit of the same rows with all kinds of PLANTED in them."""
    return audit_of(PLANTED, tmp_path_factory.mktemp("planted"), model)


def audit_of(kinds: Mapping[str, Mapping[str, int]], folder: Path, model: Path) -> tuple[Audit, dict[str, Planted]]:
    """The audit of the control's rows with so many defects in each file, and where they stand."""
    r, held_out, files, places = random.Random(7), clean_rows(100, seed=1), [], {}
    for layout, rows in clean_files().items():
        options = Options(held_out=held_out, layout=layout, words=MAX_LENGTH)
        rows, found = plant_all(rows, kinds.get(layout, {}), r, options)
        files.append(write(folder / f"{layout}.jsonl", rows))
        places |= found
    return audit(folder / "run", model, files, held_out=write(folder / "held_out.jsonl", held_out)), places


def test_the_clean_control_gives_no_alarm(control: Audit):
    assert control.whole["rows"] == control.whole["pairs"] == sum(FILES.values()) + 100         # held-out ones besides
    assert {kind: count for kind, count in control.alarms.items() if count > 1} == {}


@pytest.mark.parametrize(("layout", "kind"), [(layout, kind) for layout, kinds in PLANTED.items() for kind in kinds])
def test_what_was_planted_in_rows_is_found(planted: tuple[Audit, dict[str, Planted]], layout: str, kind: str):
    found, places = planted
    check_rows(found, kind, f"{layout}.jsonl", places[kind])


def test_prompts_of_a_benchmark_are_found_in_training(tmp_path: Path, model: Path):
    benchmark = clean_rows(60, seed=2)
    rows, places = plant(clean_rows(300), "leakage", 20, random.Random(2), Options(held_out=benchmark))
    prompts = write(tmp_path / "benchmark.jsonl", [{"prompt": row["prompt"]} for row in benchmark])
    found = audit(tmp_path / "run", model, [write(tmp_path / "rows.jsonl", rows)],
                  f"audit.against=[{{path: {prompts}}}]")
    check_rows(found, "leakage", "rows.jsonl", places)


def check_rows(audit: Audit, kind: str, name: str, places: Planted, before: int = 0) -> None:
    """Nearly all of the planted rows are counted and at most one other besides those of `before`; the examples are
    among them."""
    assert kind in audit.findings, f"{kind} is not found; found: {sorted(audit.findings)}"
    finding = audit.findings[kind]
    least, most = len(places.rows) * FOUND, len(places.rows) + len(places.beside) + 1 + before
    if kind == "preference_cycle":                       # cycles or their pairs
        least = len(places.beside) * FOUND
    assert least <= finding["count"] <= most, (finding["count"], least, most)
    shown = audit.lines(kind, name)
    assert shown and (before or len(shown - places.lines()) <= 1), sorted(shown - places.lines())


# ---------------------------------------------------------------------------------------------- what biases whole sets

def test_a_bias_of_length_and_one_of_order_are_found_and_none_of_style(tmp_path: Path, model: Path):
    counts = {"length_bias": 220, "position_bias": 180}
    rows, _ = plant_all(clean_rows(800), counts, random.Random(3), Options(layout="helpsteer"))
    found = audit(tmp_path / "run", model, [write(tmp_path / "rows.jsonl", rows)])
    assert set(found.alarms) == set(counts)
    longer = sum((len(row["response1"]) > len(row["response2"])) == (row["overall_preference"] < 0) for row in rows)
    assert abs(found.findings["length_bias"]["count"] - longer) <= 0.02 * longer


def test_a_bias_of_style_and_a_source_that_outweighs_others_are_found_and_none_of_length(tmp_path: Path, model: Path):
    rows, _ = plant(clean_rows(800), "style_bias", 350, random.Random(3))
    files = [write(tmp_path / f"{name}.jsonl", part)
             for name, part in (("large", rows[:760]), ("small", rows[760:785]), ("tiny", rows[785:]))]
    assert set(audit(tmp_path / "run", model, files).alarms) == {"style_bias", "source_imbalance"}


# --------------------------------------------------------------------------- what only tokens and log-probs can tell

TWO_BEGINNINGS = "{{ bos_token }}{{ bos_token }}" + CHATML
NO_END_OF_TURN = CHATML.replace("<|im_end|>", "")
TWO_ENDS = CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>")
THINKS_AT_QUINCES = CHATML.replace("assistant\\n' }}", "assistant\\n' + ('<think>' if 'quince' in "
                                                     "messages[-1].content else '') }}")


@pytest.mark.parametrize("template", [TWO_BEGINNINGS, NO_END_OF_TURN, TWO_ENDS])
def test_a_faulty_template_is_found(tmp_path: Path, model: Path, template: str):
    rows = write(tmp_path / "rows.jsonl", clean_rows(100))
    (tmp_path / "template.jinja").write_text(template)
    found = audit(tmp_path / "run", model, [rows], f"data.chat_template={tmp_path / 'template.jinja'}")
    assert found.findings["template_fault"]["count"] >= FOUND * 100


def test_rows_whose_prompt_is_no_prefix_under_the_template_are_found(tmp_path: Path, model: Path):
    rows, places = clean_rows(200), Planted(tuple(range(5, 200, 12)))
    for place in places.rows:
        rows[place]["prompt"] += " And what of the quince?"
    (tmp_path / "template.jinja").write_text(THINKS_AT_QUINCES)
    found = audit(tmp_path / "run", model, [write(tmp_path / "rows.jsonl", rows)],
                  f"data.chat_template={tmp_path / 'template.jinja'}")
    check_rows(found, "template_fault", "rows.jsonl", places)


def test_faults_of_rows_that_come_as_token_ids_are_found(tmp_path: Path, model: Path):
    bos, eos = 0, 2
    r = random.Random(5)

    def ids(low: int, high: int) -> list[int]:
        return [r.randrange(3, 1000) for _ in range(r.randint(low, high))]

    rows = [{"prompt_ids": [bos, *ids(20, 60)], "chosen_ids": [*ids(20, 80), eos], "rejected_ids": [*ids(20, 80), eos]}
            for _ in range(300)]
    rows, places = token_faults(rows, 24, r, bos, eos)
    found = audit(tmp_path / "run", model, [write(tmp_path / "rows.jsonl", rows)])
    check_rows(found, "template_fault", "rows.jsonl", places)


def test_pairs_that_the_reference_finds_too_easy_or_hopeless_are_found(tmp_path: Path):
    rows = clean_rows(100, sentences=(3, 5))
    write_unigram_model(tmp_path / "model", texts_of(rows), CHATML)
    rows, places = plant_all(rows, {"too_easy": 8, "hopeless": 8}, random.Random(1))
    file = write(tmp_path / "rows.jsonl", rows)
    words = (f"reference.cache_dir={tmp_path / 'reference'}", "cluster.procs_per_node=1")
    dpo_dist("score", f"data.train=[{{path: {file}, name: rows}}]", f"model.path={tmp_path / 'model'}",
             f"run.dir={tmp_path / 'score'}", f"data.max_length={MAX_LENGTH}", "data.on_bad_row=skip",
             f"data.cache_dir={tmp_path / 'run' / 'tokens'}", "cluster.device=cpu", "model.dtype=fp32", *words)
    found = audit(tmp_path / "run", tmp_path / "model", [file], *words)
    for kind in places:
        check_rows(found, kind, "rows.jsonl", places[kind])


# --------------------------------------------------------------------------------------------------- the two real sets

REAL = {"hh": "hh_harmless_test.jsonl.gz", "sharegpt": "dpo_en_demo.json"}
PLANTED_IN_REAL = {"duplicate_pair": 20, "near_duplicate_prompt": 12, "contradiction": 12, "preference_cycle": 6,
                   "identical_completions": 12, "truncation_loss": 10, "empty_reasoning": 12,
                   "special_tokens_in_text": 12, "language_mix": 20, "leakage": 8}
JUDGED_IN_REAL = {"tie": 20, "both_bad": 12, "annotator_disagreement": 20}


def real_rows(name: str) -> list[Row]:
    path = SHARED / name
    if path.suffix == ".gz":
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return json.loads(path.read_text())


@needs_shared
@pytest.mark.parametrize("layout", REAL)
def test_what_was_planted_in_a_real_set_is_found(tmp_path: Path, model: Path, layout: str):
    """A real set has defects of its own, so a count may be larger by what the set's own audit counts."""
    rows = real_rows(REAL[layout])[:1000]                # of 2,312 transcripts, to be quick
    held_out, rows = rows[:len(rows) // 8], rows[len(rows) // 8:]
    held = write(tmp_path / "held_out.jsonl", held_out)
    own = audit(tmp_path / "own", model, [write(tmp_path / "own.jsonl", rows)], held_out=held, max_length=LONGEST)
    for plan, into in ((PLANTED_IN_REAL, None), (JUDGED_IN_REAL, "argilla")):
        changed, places = plant_all(rows, plan, random.Random(11),
                                   Options(held_out=held_out, layout=into, words=LONGEST))
        name = f"{into or layout}.jsonl"
        found = audit(tmp_path / f"run-{name}", model, [write(tmp_path / name, changed)], held_out=held,
                      max_length=LONGEST)
        for kind in plan:
            before = own.findings.get(kind, {"count": 0})["count"]
            check_rows(found, kind, name, places[kind], before)
