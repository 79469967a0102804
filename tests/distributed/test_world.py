"""Ranks wait for another's work as long as it takes where that rank is alive, and no longer where it is not."""
from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import forked, forked_ranks, kill, wait_until, write_tiny_llama
from transformers import LlamaForCausalLM

from dpo_dist.launcher.ranks import Place
from dpo_dist.models.digest import model_digest
from dpo_dist.runtime.ports import free_port

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 4
BEGIN = f"""
import os, sys, time
from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.runtime.world import World, lost_peer
cluster = compose(["model.path=m", "cluster.device=cpu", "cluster.timeout_seconds={TIMEOUT_SECONDS}"]).cluster
world = World.start(cluster)
def slow(seconds, value):
    time.sleep(seconds)
    return value
"""
END = """
world.barrier()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_work_may_take_longer_than_the_timeout_of_a_collective(ranks: int):
    out = forked_ranks(ranks, "-c", BEGIN + f"""
began = time.monotonic()
assert world.on_main(lambda: slow({TIMEOUT_SECONDS + 2}, "result of rank 0")) == "result of rank 0"
seconds = {TIMEOUT_SECONDS + 2} * (world.rank == {ranks - 1})
assert world.together(lambda: slow(seconds, world.rank)) == [*range({ranks})]
if world.is_main:
    print(time.monotonic() - began)
""" + END)
    assert 2 * (TIMEOUT_SECONDS + 2) <= float(out) < 2 * (TIMEOUT_SECONDS + 2) + 5


def test_short_work_is_not_held_up_by_the_signs_of_life():
    out = forked_ranks(2, "-c", BEGIN + """
world.on_main(lambda: None)
began = time.monotonic()
for i in range(50):
    assert world.on_main(lambda: i) == i and world.together(lambda: i + world.rank) == [i, i + 1]
if world.is_main:
    print(time.monotonic() - began)
""" + END)
    assert float(out) < 5, "100 exchanges, each of which would take a second"


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("mistake", [True, False])
def test_what_one_rank_raises_is_raised_on_all(failing: int, mistake: bool):
    kind = "UserError" if mistake else "ZeroDivisionError"
    forked_ranks(2, "-c", BEGIN + f"""
def work():
    time.sleep(1.5 * (world.rank == {failing}))
    if world.rank == {failing}:
        raise {kind}("why it failed")
for way in (world.together, *([world.on_main] if {failing} == 0 else [])):
    try:
        way(work)
        sys.exit("nothing was raised")
    except ({kind}, RuntimeError) as error:
        own = world.rank == {failing}
        wanted = {kind} if own or {mistake} else RuntimeError
        assert type(error) is wanted and "why it failed" in str(error), error
        assert own or {mistake} or "rank {failing} failed" in str(error), error
""" + END)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("way", ["on_main", "together"])
def test_a_rank_that_is_stopped_or_dies_at_its_work_is_noticed(how: signal.Signals, way: str, tmp_path: Path):
    program = BEGIN + f"""
open(f"{tmp_path}/begun-{{world.rank}}", "w")
try:
    world.{way}(lambda: slow(3600 * (world.rank == 0), None))
except Exception as error:
    print(lost_peer(error, cluster), flush=True)
    os._exit(3)
"""
    place = Place(2, master_port=free_port())
    ranks = [forked("-c", program, **place.environment(rank)) for rank in range(2)]
    try:
        wait_until(lambda: len([*tmp_path.glob("begun-*")]) == 2, *ranks)
        time.sleep(2)                                            # both are inside
        os.kill(ranks[0].pid, how)
        out, err = ranks[1].communicate(TIMEOUT_SECONDS + 20)
        assert ranks[1].returncode == 3, err
        assert ("no answer from another rank" if how == signal.SIGSTOP else "closed its connection") in out
    finally:
        kill(rank.pid for rank in ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_models_digest_is_the_same_when_its_files_are_spread_over_ranks(ranks: int, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(write_tiny_llama(tmp_path / "one"))
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len([*(tmp_path / "split").glob("*.safetensors")]) > 3
    for folder in ("one", "split"):
        out = forked_ranks(ranks, "-c", BEGIN + f"""
from pathlib import Path
from dpo_dist.models.digest import model_digest
digests = set(world.gather(model_digest(Path("{tmp_path / folder}"), Path("{tmp_path / 'memory'}"), world)))
if world.is_main:
    print(*digests)
""" + END)
        assert out.split() == [model_digest(tmp_path / "one")]
