"""eval.harness.tasks: lm-evaluation-harness runs on the exported model in the end, and its results are kept.

Here a program that takes its arguments and writes a file as it does stands in for it; the last test needs the real one,
in the environment of DPO_DIST_HARNESS_PYTHON.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import dpo_dist

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.demo import write_inputs
from dpo_dist.launcher.plan import plan_stages

pytestmark = pytest.mark.distributed
STAND_IN = '''
import json, os, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = words["--output_path"] + "/model"
assert "RANK" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"
if words["--tasks"] == "broken":
    sys.exit("KeyError: no such task")
os.makedirs(folder)
results = {"results": {words["--tasks"]: {"alias": "a", "acc,none": 0.75, "acc_stderr,none": 0.1}}, "words": sys.argv}
json.dump(results, open(folder + "/results_2030-01-01.json", "w"))
'''
TASK = '''
task: tone
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["madam", "mate"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
'''


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_inputs(tmp_path)
    rows = [json.dumps({"question": f"Question {i}: ", "answer": i % 2}) for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tone.yaml").write_text(TASK.format(rows=tmp_path / "questions.jsonl"))
    return [f"model.path={tmp_path / 'base'}", *base[:-2], "data.max_length=128", "zero=none", "loss=simpo",
            f"data.train={tmp_path / 'pairs.jsonl'}", "train.max_steps=1", "train.pairs_per_step=8",
            f"run.dir={tmp_path / 'run'}", f"eval.harness.path={tmp_path / 'tasks'}"]


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__main__.py").write_text(STAND_IN)
    (tmp_path / "lm_eval" / "__init__.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return f"eval.harness.python={python}"


def test_it_runs_on_the_exported_model_and_again_only_where_something_changed(tmp_path: Path, words: list[str],
                                                                             stand_in: str):
    given = [*words, stand_in, "eval.harness.tasks=[tone]", "eval.harness.arguments=['--num_fewshot','3']"]
    told = dpo_dist("run", *given).stdout
    kept = json.loads((tmp_path / "run" / "harness.json").read_text())
    assert kept["results"]["tone"]["acc,none"] == 0.75 and kept["of"]["tasks"] == ["tone"]
    assert "acc,none" in told and "0.7500" in told and "0.1000" in told
    written = json.loads((tmp_path / "run" / "harness" / "model" / "results_2030-01-01.json").read_text())["words"]
    model = f"pretrained={tmp_path / 'run' / 'model'},dtype=float32,trust_remote_code=False"
    assert written[1:] == ["--model", "hf", "--model_args", model, "--tasks", "tone", "--device", "cpu",
                           "--output_path", str(tmp_path / "run" / "harness"), "--include_path",
                           str(tmp_path / "tasks"), "--num_fewshot", "3"]
    assert "nothing to do" in dpo_dist("harness", *given).stdout
    (tmp_path / "tasks" / "tone.yaml").write_text("task: tone\n")
    assert "nothing to do" not in dpo_dist("harness", *given).stdout
    failed = dpo_dist("harness", *given, "eval.harness.tasks=[broken]", code=2)
    assert "no such task" in failed.stderr and "harness.log" in failed.stderr


def test_what_cannot_run_is_said_before_anything_is_computed(tmp_path: Path, words: list[str], stand_in: str):
    for keys, said in (([], "does not find"), (["eval.harness.python=/nowhere/python"], "cannot be started"),
                       ([stand_in, f"eval.harness.path={tmp_path / 'none'}"], "is no folder")):
        failed = dpo_dist("run", *words, *keys, "eval.harness.tasks=[tone]", code=2)
        assert said in failed.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_it_is_the_last_stage_in_one_process_and_only_where_tasks_are_named():
    words = ["model.path=m", "data.train=rows.jsonl", "cluster.nodes=2", "cluster.procs_per_node=4", "cluster=slurm",
             "cluster.slurm.time_limit=1:00:00"]
    named = [*words, "eval.harness.tasks=[arc_easy]"]
    *before, last = plan_stages("run", compose(named), named).stages
    assert (last.name, last.ranks, last.after) == ("harness", 1, ("train",))
    assert [stage.ranks for stage in before] == [1, 8, 8] and compose(last.overrides).cluster.nodes == 1
    assert [stage.name for stage in plan_stages("run", compose(words), words).stages] == ["audit", "score", "train"]
    ahead = ["model.path=m", "data.train=rows.jsonl", "reference.mode=ahead", "eval.harness.tasks=[arc_easy]"]
    stages = plan_stages("run", compose(ahead), ahead).stages
    assert [stage.name for stage in stages] == ["audit", "score", "train", "harness"]
    with pytest.raises(UserError, match="would do nothing"):
        compose([*words, "eval.harness.path=tasks"])
    with pytest.raises(UserError, match=r"export\.what=both"):
        compose([*named, "export.what=adapter", "model.lora.rank=4"])


@pytest.mark.skipif("DPO_DIST_HARNESS_PYTHON" not in os.environ, reason="DPO_DIST_HARNESS_PYTHON names no environment")
def test_the_real_one_evaluates_a_task_of_ones_own(tmp_path: Path, words: list[str]):
    python = os.environ["DPO_DIST_HARNESS_PYTHON"]
    dpo_dist("run", *words, f"eval.harness.python={python}", "eval.harness.tasks=[tone]",
             "eval.harness.arguments=['--apply_chat_template']")
    kept = json.loads((tmp_path / "run" / "harness.json").read_text())
    assert kept["samples"]["tone"]["effective"] == 6 and 0 <= kept["results"]["tone"]["acc,none"] <= 1
