"""reference.mode=ahead: the same weights as when the reference is scored first, and nothing lost whoever is killed."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors.numpy
from conftest import (
    REPO,
    dpo_dist,
    eval_on,
    kill,
    model_digest,
    processes_on,
    start,
    steps_logged,
    train_on,
    wait_until,
    write_rows,
    write_tiny_llama,
)

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.data.sampler import make_sampler
from dpo_dist.reference.cache.store import sequence_key

pytestmark = pytest.mark.distributed

STEPS = 8


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    write_rows(tmp_path / "rows.jsonl", 200, longest=100)
    write_rows(tmp_path / "held_out.jsonl", 10, seed=1)
    return ["run", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=24", f"train.max_steps={STEPS}",
            "optim.lr=1e-3", "loss.beta=0.5", "train.tokens_per_microbatch=600"]


def entries(cache_dir: Path) -> list[bytes]:
    return [key.tobytes() for shard in cache_dir.rglob("*.safetensors")
            for key in safetensors.numpy.load_file(shard)["keys"]]


def trainable(words: list[str], cache: Path) -> int:
    """How many steps, from the first, have all their values in the cache."""
    config, held = compose(words[1:]), set(entries(cache))
    pairs = prepare(config.data, None, None)[0]
    order = make_sampler(pairs, config.train, config.data.group_by_prompt)
    for step in range(1, STEPS + 1):
        parts = [pairs.parts(i) for i in order.pairs_of_step(step, config.train.epochs, STEPS).tolist()]
        if not {sequence_key(prompt, completion) for prompt, *both in parts for completion in both} <= held:
            return step - 1
    return STEPS


def stopped_midway(words: list[str], run: Path, cache: Path) -> list[int]:
    """The scorer's processes, stopped where the values of the first step and of the held-out pairs are there and the
    last step's are not."""
    wait_until(lambda: len(entries(cache)) >= 2 * (24 + 10), what="the first step's values")
    scorer = processes_on(run / "scoring")
    assert scorer, "there was something to stop"
    for pid in scorer:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: steps_logged(run) == trainable(words, cache) > 0, what="what can be trained")
    assert trainable(words, cache) < STEPS, "the stop came midway"
    return scorer


@pytest.mark.parametrize(("zero", "world", "procs"), [("none", 1, 2), ("zero3", 2, 1)])
def test_training_beside_the_scoring_gives_the_very_bits_of_scoring_first(
        zero: str, world: int, procs: int, tmp_path: Path, words: list[str]):
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    words = [*words, f"zero={zero}", f"cluster.procs_per_node={world}"]
    dpo_dist(*words, f"run.dir={tmp_path / 'cached'}")
    ahead = [*words, "reference.mode=ahead", f"reference.procs={procs}", f"reference.cache_dir={tmp_path / 'other'}"]
    shown = dpo_dist(*ahead, f"run.dir={tmp_path / 'ahead'}").stdout
    assert "reference: scored while training ran, which waited " in shown
    assert model_digest(tmp_path / "ahead") == model_digest(tmp_path / "cached")
    scored = entries(tmp_path / "other")
    assert len(scored) == len(set(scored)) == 2 * (STEPS * 24
                                                   + 10), "what training asks for, each sequence once, and no more"
    assert processes_on(tmp_path / "ahead") == []


def test_a_killed_scorer_ends_the_run_in_words_and_a_killed_trainer_the_scorer_and_the_same_command_goes_on(
        tmp_path: Path, words: list[str]):
    words = [*words, "zero=none"]
    dpo_dist(*words, f"run.dir={tmp_path / 'cached'}")
    run, cache = tmp_path / "ahead", tmp_path / "other"
    ahead = [*words, "reference.mode=ahead", f"reference.cache_dir={cache}"]

    process = start(*ahead, f"run.dir={run}")
    kill(stopped_midway(ahead, run, cache))
    shown = "".join(process.communicate(timeout=120))
    kept = len(entries(cache))
    assert process.returncode == 2 and 0 < kept < 2 * (STEPS * 24 + 10), "the kill came midway"
    assert "the scoring processes have ended before all was scored: the score stage ended with code -9" in shown
    assert list(run.glob("checkpoints/*/COMPLETE")), "what was trained is saved"

    process = start(*ahead, f"run.dir={run}")
    wait_until(lambda: len(entries(cache)) > kept, what="more scored")
    ranks = [pid for pid in processes_on(run) if pid != process.pid and pid not in processes_on(run / "scoring")]
    assert ranks, "there was something to kill"
    kill(ranks)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (run / "DONE").exists()
    assert processes_on(run) == [], "no orphans"

    assert "resumed from step-" in dpo_dist(*ahead, f"run.dir={run}").stdout
    assert model_digest(run) == model_digest(tmp_path / "cached")
    assert max(Counter(entries(cache)).values()) == 1


def test_training_alone_waits_no_longer_than_it_was_told_and_says_what_to_start(tmp_path: Path, words: list[str]):
    alone = [sys.executable, "-m", "dpo_dist.train", *words[1:], "zero=none", "reference.mode=ahead",
             "cluster.timeout_seconds=3", f"run.dir={tmp_path / 'alone'}"]
    done = subprocess.run(alone, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "not there: start `dpo-dist score` with the same overrides beside this" in done.stderr + done.stdout


def test_a_run_that_is_told_to_end_while_it_waits_saves_and_both_sides_end(tmp_path: Path, words: list[str]):
    run, words = tmp_path / "run", [*words, "zero=none", "reference.mode=ahead"]
    process = start(*words, f"run.dir={run}")
    stopped_midway(words, run, tmp_path / "reference")   # nothing more comes: training went as far as it can, and waits
    process.send_signal(signal.SIGTERM)
    shown = "".join(process.communicate(timeout=120))
    assert (run / "PREEMPTED").exists() and "training was waiting for the reference" in shown, shown
    assert list(run.glob("checkpoints/*/COMPLETE"))
    assert processes_on(run) == []
