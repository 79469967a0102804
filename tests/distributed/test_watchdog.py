"""A hung collective ends the job: every rank's log says where it stood, and the message where to look."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import (
    forked,
    kill,
    process_of_rank,
    start,
    steps_logged,
    train_on,
    wait_until,
    write_rows,
    write_tiny_llama,
)

from dpo_dist.launcher.ranks import Place
from dpo_dist.runtime.ports import free_port

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 5
BEGIN = f"""
import os, sys, time
from pathlib import Path
from dpo_dist.config.compose import compose
from dpo_dist.runtime.watchdog import sign, watching
from dpo_dist.runtime.world import World, lost_peer
cluster = compose(["model.path=m", "cluster.device=cpu", "cluster.timeout_seconds={TIMEOUT_SECONDS}"]).cluster
world = World.start(cluster)
"""


def in_two_ranks(folder: Path, work: str) -> list[tuple[int, str]]:
    """(exit code, log) of each of two ranks that do this in the watchdog's sight; 3 where a peer did not answer."""
    program = BEGIN + f"""
def work():
{work}
try:
    with watching(Path({str(folder)!r}) / f"rank-{{world.rank}}.log", {TIMEOUT_SECONDS}):
        work()
except Exception as error:
    os._exit(3 if lost_peer(error, cluster) else 4)
os._exit(0)
"""
    place = Place(2, master_port=free_port())
    ranks = [forked("-c", program, **place.environment(rank)) for rank in range(2)]
    try:
        codes = [rank.wait(4 * TIMEOUT_SECONDS) for rank in ranks]
    finally:
        kill(rank.pid for rank in ranks)
    return [(code, (folder / f"rank-{rank}.log").read_text()) for rank, code in enumerate(codes)]


def test_a_rank_that_is_stopped_in_training_ends_the_job_and_every_log_says_where_its_rank_stood(tmp_path: Path,
                                                                                                base: list[str]):
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 100)
    process = start("train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), "zero=zero3",
                    "cluster.procs_per_node=2", "train.max_steps=2000", "train.pairs_per_step=8",
                    f"cluster.timeout_seconds={TIMEOUT_SECONDS}", f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < TIMEOUT_SECONDS + 20
    failure = json.loads((tmp_path / "run" / "FAILED").read_text())
    assert "(cluster.timeout_seconds)" in failure["message"] and "rank-0.log" in failure["message"], failure
    assert failure["message"] in err
    for rank in range(2):
        log = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert 'train.py", line' in log, log[-3000:]


def test_a_rank_that_hangs_outside_of_collectives_is_told_by_its_stack(tmp_path: Path):
    (waiting, its_log), (hanging, other_log) = in_two_ranks(tmp_path, f"""
    if world.rank == 1:
        time.sleep({1.5 * TIMEOUT_SECONDS})
    world.barrier()
""")
    assert waiting == 3 and "in barrier" in its_log
    assert hanging == 3 and "Timeout" in other_log and "in barrier" not in other_log


def test_ranks_that_wait_for_each_other_in_different_collectives_are_ended(tmp_path: Path):
    found = in_two_ranks(tmp_path, """
    world.on_main(lambda: None)
    world.sum(__import__("torch").zeros(3)) if world.rank else world._from_main(None)
    world.barrier()
""")
    assert 0 not in [code for code, _ in found], found


def test_a_rank_that_has_ended_is_not_waited_for_where_a_process_group_is_made(tmp_path: Path):
    (code, _), (ended, _) = in_two_ranks(tmp_path, """
    if world.rank == 1:
        os._exit(0)                                             # as a rank ends that was sent a signal early
    world.beside()
""")
    assert (code, ended) == (3, 0)


def test_work_that_takes_longer_than_the_timeout_is_left_alone(tmp_path: Path):
    found = in_two_ranks(tmp_path, f"""
    world.on_main(lambda: time.sleep({1.2 * TIMEOUT_SECONDS}))
    for _ in range({TIMEOUT_SECONDS * 6}):                      # packs, without a collective
        sign()
        time.sleep(0.2)
    world.barrier()
""")
    assert found == [(0, "")] * 2


def test_a_sign_costs_next_to_nothing():
    from dpo_dist.runtime.watchdog import sign

    began = time.perf_counter()
    for _ in range(100_000):
        sign()
    assert time.perf_counter() - began < 1, "10 µs each"
