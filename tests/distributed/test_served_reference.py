"""A reference in servers of its own, through the real command: audited before it is believed, never mixed, and borne
with when it fails."""
from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import (
    REPO,
    dpo_dist,
    forked,
    kill,
    metrics,
    processes_on,
    start,
    train_on,
    wait_until,
    write_rows,
    write_tiny_llama,
)
from log_prob_server import Answer, LogProbServer, values
from template import Started

from dpo_dist.runtime.ports import free_port

pytestmark = pytest.mark.distributed
SERVER = REPO / "tests" / "log_prob_server.py"
MIDWAY = str(2 * 16 + 150)            # answered sequences: the audit's, and some of the 600


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 40)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), f"run.dir={tmp_path / 'run'}",
            "reference=vllm", "reference.requests.wait_seconds=20", "reference.audit.pairs=8"]


def kept(cache_dir: Path) -> Counter[bytes]:
    """How often each sequence stands in the cache."""
    return Counter(key.tobytes() for shard in cache_dir.rglob("*.safetensors")
                   for key in safetensors.numpy.load_file(shard)["keys"])


def audit_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "parity.json").read_text())


@pytest.mark.parametrize(("processes", "auditor"), [(1, "hf"), (2, "zero")])
def test_the_servers_values_are_the_oracles_and_stand_under_a_key_of_their_own(
        tmp_path: Path, words: list[str], processes: int, auditor: str):
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey

    with LogProbServer(tmp_path / "m") as a, LogProbServer(tmp_path / "m") as b:
        more = [f"reference.urls=[{a.url}/v1, {b.url}]", f"cluster.procs_per_node={processes}",
                "train.tokens_per_microbatch=100", f"reference.audit.oracle={auditor}"]
        out = dpo_dist("score", *words, *more).stdout
        assert out.strip().endswith("scored 80, cached 0") and "parity of vllm 0.0.test" in out
        assert a.answered and b.answered
    plain = [word for word in words if not word.startswith("reference")]
    assert dpo_dist("score", *plain,
                    f"reference.cache_dir={tmp_path / 'oracle'}").stdout.strip().endswith("scored 80, cached 0")
    caches = []
    for where in (tmp_path / "reference", tmp_path / "oracle"):
        (folder,) = where.iterdir()
        caches.append(LogpCache(str(where), ReferenceKey(**json.loads((folder / "key.json").read_text()))))
        caches[-1].open_shards(caches[-1].verified_shards()[0])
    assert caches[0].folder.name != caches[1].folder.name
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("chosen_ids", "rejected_ids"):
            served, oracle = (cache.logps(row["prompt_ids"], row[name]) for cache in caches)
            assert np.abs(served - oracle).max() < 5e-5
    found = audit_of(tmp_path)
    assert found["passed"] and found["token_max"] < 5e-5 and found["servers"] == 2


def test_servers_ahead_of_training_are_audited_before_it_begins(tmp_path: Path, words: list[str]):
    with LogProbServer(tmp_path / "m") as server:
        out = dpo_dist("run", *words, f"reference.urls=[{server.url}]", "reference.mode=ahead", "zero=zero2",
                       "train.pairs_per_step=8").stdout
        assert "parity of vllm 0.0.test" in out
        assert len(server.answered) == 80 + 2 * 16, "all once, the audit's sample twice more"
    passport = json.loads((tmp_path / "run" / "run.json").read_text())["passport"]
    assert passport["parity"]["passed"] and passport["parity"] == json.loads(
        (tmp_path / "run" / "scoring" / "parity.json").read_text())
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_values_in_the_cache_need_no_server_but_their_audit_must_be_within_this_runs_bounds(tmp_path: Path,
                                                                                            words: list[str]):
    with LogProbServer(tmp_path / "m") as server:
        dpo_dist("score", *words, f"reference.urls=[{server.url}]")
    words += ["reference.urls=[http://127.0.0.1:1]", f"run.dir={tmp_path / 'again'}"]
    again = dpo_dist("score", *words).stdout
    assert again.strip().endswith("scored 0, cached 80") and "parity of vllm 0.0.test" in again
    assert "is over reference.audit.token_max=1e-12" in dpo_dist("score", *words, "reference.audit.token_max=1e-12",
                                                                 code=2).stderr
    next((tmp_path / "reference").rglob("parity.json")).unlink()
    assert "without the audit that preceded them" in dpo_dist("score", *words, code=2).stderr


def noisy(server: LogProbServer) -> None:
    noise = np.random.default_rng(0)

    def fault(n: int, answer: Answer) -> Answer:
        for _, entry in values(answer):
            entry["logprob"] -= abs(noise.normal(0, 3e-4))
        return answer

    server.fault = fault


def by_place(server: LogProbServer) -> None:
    """The first sequence of a request is right, the others are off a little."""
    def fault(n: int, answer: Answer) -> Answer:
        for at, entry in values(answer):
            entry["logprob"] -= 1e-3 * (at > 0)
        return answer

    server.fault = fault


def stale(server: LogProbServer) -> None:
    """What stands after a prefix that was seen before, in whole blocks of four tokens, comes from a cache that holds
    something else."""
    seen: set[tuple[int, ...]] = set()
    honest = server.prompt_logprobs

    def prompt_logprobs(prompt: list[int]) -> list[dict[str, Any] | None]:
        cached = 0
        while tuple(prompt[:cached + 4]) in seen and cached + 4 <= len(prompt):
            cached += 4
        seen.update(tuple(prompt[:end]) for end in range(4, len(prompt) + 1, 4))
        return [None, *({key: {**entry, "logprob": -1.0} if at < cached else entry
                         for key, entry in (found or {}).items()}
                        for at, found in enumerate(honest(prompt)[1:], 1))]

    server.prompt_logprobs = prompt_logprobs  # type: ignore[method-assign]


def other_weights(server: LogProbServer) -> None:
    import torch

    with torch.no_grad():
        server.model.model.layers[1].mlp.down_proj.weight[2, 3] += 0.05


@pytest.mark.parametrize("plant", [noisy, by_place, stale, other_weights])
def test_a_planted_fault_is_caught_before_a_value_is_kept_and_the_worst_pairs_are_named(tmp_path: Path,
                                                                                        words: list[str], plant):
    with LogProbServer(tmp_path / "m") as honest, LogProbServer(tmp_path / "m") as planted:
        plant(planted)
        shown = dpo_dist("score", *words, f"reference.urls=[{honest.url}, {planted.url}]", code=2).stderr
    assert "the audit stopped the run before a value was used" in shown and re.search(
        r"Worst pairs, in nats: " r"\S+rows.jsonl:\d+", shown), shown
    assert not kept(tmp_path / "reference")
    assert audit_of(tmp_path)["passed"] is False


def test_a_planted_stale_prefix_is_right_the_first_time_so_that_one_pass_over_the_sample_would_not_do(tmp_path: Path):
    write_tiny_llama(tmp_path / "m")
    with LogProbServer(tmp_path / "m") as server:
        honest = server.prompt_logprobs([5, 6, 7, 8, 9, 10])
        stale(server)
        assert server.prompt_logprobs([5, 6, 7, 8, 9, 10]) == honest
        assert server.prompt_logprobs([5, 6, 7, 8, 9, 10]) != honest


def test_live_values_are_audited_too_and_train_as_cached_ones_do(tmp_path: Path, words: list[str]):
    with LogProbServer(tmp_path / "m") as server:
        more = [f"reference.urls=[{server.url}]", "train.pairs_per_step=10", "train.max_steps=3", "zero=none",
                "optim.lr=1e-3"]
        dpo_dist("run", *words, *more)
        dpo_dist("train", *words, *more, "reference.mode=live", f"run.dir={tmp_path / 'live'}")
    cached, live = metrics(tmp_path / "run"), metrics(tmp_path / "live")
    assert [row["loss"] for row in live] == pytest.approx([row["loss"] for row in cached], abs=1e-6)
    for where in ("run", "live"):
        lineage = json.loads((tmp_path / where / "run.json").read_text())["passport"]
        assert lineage["parity"]["passed"] and lineage["parity"]["engine"].startswith("vllm 0.0.test")
    plain = [word for word in words if not word.startswith("reference")] + [
        word for word in more if not word.startswith("reference")]
    assert "reference_key was" in dpo_dist("train", *plain, code=2).stderr, "a run's values are of one engine"


# --------------------------------------------------------------------------------------------- servers that come and go


@contextmanager
def server_process(folder: Path, port: int, answered: Path, *more: str) -> Iterator[Started]:
    process = forked(SERVER, "--model", folder, "--port", port, "--seconds-a-request", "0.05", "--answered", answered,
                     *more)
    try:
        yield process
    finally:
        kill([process.pid])
        process.wait()


def answered_lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_server_killed_and_started_again_midway_leaves_every_value_there_and_none_scored_twice(tmp_path: Path,
                                                                                                 words: list[str]):
    write_rows(tmp_path / "rows.jsonl", 300)
    port, log = free_port(), tmp_path / "answered"
    words += [f"reference.urls=[http://127.0.0.1:{port}]", "cluster.procs_per_node=2",
              "train.tokens_per_microbatch=200", "reference.requests.sequences=4", "reference.requests.wait_seconds=50"]
    scoring = start("score", *words)                                # before there is a server: it may be starting
    with server_process(tmp_path / "m", port, log, "--killed-after", MIDWAY) as server:
        assert server.wait(timeout=90) == -signal.SIGKILL
    assert len(answered_lines(log)) < 500, "the kill came midway"
    with server_process(tmp_path / "m", port, log):
        out, err = scoring.communicate(timeout=180)
    assert scoring.returncode == 0, err
    assert out.strip().endswith("scored 600, cached 0")
    assert len(kept(tmp_path / "reference")) == 600 and max(kept(tmp_path / "reference").values()) == 1
    times = Counter(Counter(answered_lines(log)).values())
    assert times == {1: 600 - 16, 3: 16}, "each sequence once, those of the sample twice more"


@pytest.mark.slow
def test_a_server_that_never_comes_back_ends_the_run_after_the_stated_time_and_what_was_scored_is_kept(
        tmp_path: Path, words: list[str]):
    write_rows(tmp_path / "rows.jsonl", 300)
    port, log = free_port(), tmp_path / "answered"
    words += [f"reference.urls=[http://127.0.0.1:{port}]", "train.tokens_per_microbatch=200",
              "reference.requests.sequences=4"]
    with server_process(tmp_path / "m", port, log, "--killed-after", MIDWAY) as server:
        scoring = start("score", *words, "reference.requests.wait_seconds=15")
        assert server.wait(timeout=90) == -signal.SIGKILL
        began = time.monotonic()
        _, err = scoring.communicate(timeout=120)
    assert scoring.returncode == 2 and 10 < time.monotonic() - began < 100
    assert "gave no answer for 15 s" in err and "What was scored is kept" in err, err
    held = len(kept(tmp_path / "reference"))
    assert held >= 100
    with server_process(tmp_path / "m", port, log):
        out, err = start("score", *words).communicate(timeout=180)
    assert out.strip().endswith(f"scored {600 - held}, cached {held}"), err


def own_server(*more: str) -> str:
    words = [sys.executable, str(SERVER), "--model {model} --name {name} --port {port}", *more]
    return f"reference.server='{' '.join(words)}'"


def test_a_server_that_the_run_starts_is_stopped_with_it_and_leaves_its_log(tmp_path: Path, words: list[str]):
    done = dpo_dist("run", *words, own_server(), "reference.version=0.0.test", "train.pairs_per_step=10",
                    "train.max_steps=2", "cluster.procs_per_node=2")
    assert "reference: vllm 0.0.test, quantization none" in done.stdout
    assert (tmp_path / "run" / "DONE").exists() and (tmp_path / "run" / "logs" / "reference-server-0.log").exists()
    assert not servers_of(tmp_path / "m")


def test_a_server_started_from_a_rank_of_torchrun_makes_a_process_group_of_its_own(tmp_path: Path, words: list[str]):
    """As vLLM does. With torchrun's variables it would wait for torchrun's store instead of being its own master."""
    dpo_dist("score", *words, own_server(f"--joins-a-group {free_port()}"), "reference.version=0.0.test",
             "cluster.procs_per_node=2")
    assert max(kept(tmp_path / "reference").values()) == 1


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path, words: list[str]):
    broken = tmp_path / "broken.py"
    broken.write_text("print(1 / 0)\n")
    shown = dpo_dist("score", *words, f"reference.server='{sys.executable} {broken} {{port}}'", "reference.version=1",
                     code=2).stderr
    assert "ended with code 1 before it answered" in shown and "ZeroDivisionError" in shown
    assert "has no vLLM" in dpo_dist("score", *words, f"reference.server={sys.executable}", code=2).stderr
    assert "has values to score, but no servers" in dpo_dist("score", *words, "reference.version=1", code=2).stderr


def test_a_server_ends_even_where_the_run_is_killed(tmp_path: Path, words: list[str]):
    scoring = start("score", *words, own_server("--seconds-a-request 1"), "reference.version=0.0.test")
    wait_until(lambda: servers_of(tmp_path / "m"))
    ranks = [pid for pid in processes_on(tmp_path / "run") if pid != scoring.pid]
    assert ranks
    kill([scoring.pid, *ranks])
    scoring.communicate()
    wait_until(lambda: not servers_of(tmp_path / "m"))


def servers_of(folder: Path) -> list[int]:
    """Processes that serve the model of this folder, and their watchers."""
    return [pid for pid, line in command_lines() if os.fsencode(SERVER) in line.split(b"\0")
            and os.fsencode(folder) in line.split(b"\0")]


def command_lines() -> Iterator[tuple[int, bytes]]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield int(process.name), (process / "cmdline").read_bytes()
        except OSError:
            continue
