"""How each command's process begins and ends: config, log file, world; then one message and an exit code."""
from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

import huggingface_hub.constants

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.disk_faults import disk_fault
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.hub_commits import pin
from dpo_dist.runtime.lock import hold_lock
from dpo_dist.runtime.preemption import Stopped
from dpo_dist.runtime.process_defaults import set_defaults
from dpo_dist.runtime.run_dir import DONE, FAILED, PREEMPTED, Failure, RunDir
from dpo_dist.runtime.shared_folders import shared_folders
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.watchdog import watching
from dpo_dist.runtime.world import World, lost_peer, own_node, own_rank

Work = Callable[[RunConfig, World, Terminal], None]
Afterwards = Callable[[RunConfig, RunDir, Terminal], None]


def run_entry(overrides: Sequence[str], work: Work, owns_run: bool = False,
              afterwards: Afterwards | None = None) -> int:
    """Runs `work` in the world that the environment describes. 0 on success, 2 for a user's mistake, 1 otherwise.

    The first rank to fail writes <run.dir>/FAILED with the message and the code, and shows it to the person. On other
    nodes, which have terminals of their own, one rank shows what it saw; the rest only log. Work that was stopped
    leaves <run.dir>/PREEMPTED with the signal. `owns_run`: the work is the run itself: only one process group at a
    time, and success leaves <run.dir>/DONE. `afterwards`: what rank 0 does once the marker says how the run ended.
    """
    gc.freeze()                          # imported objects stay: no collection needs to look at them
    gc.enable()
    set_defaults()
    try:
        config = compose(overrides)
        run_dir = RunDir(config.run_dir)
        lock = _prepare(run_dir, config.run.readable_by, owns_run)        # held until the process ends
    except UserError as error:
        if own_rank() == 0:                                      # every rank would say the same, and has no log yet
            print(f"error: {error}", file=sys.stderr)
        return 2
    pin(run_dir.hub_commits())
    # Hugging Face's libraries read the variable when they are imported. That may be over by now, so both are set.
    os.environ["HF_HUB_OFFLINE"] = "1" if config.run.offline else "0"
    huggingface_hub.constants.HF_HUB_OFFLINE = config.run.offline
    try:
        terminal = Terminal.start(str(run_dir.rank_log(own_rank())), is_main=own_rank() == 0,
                                  capture=os.environ.get("DPO_DIST_CAPTURE") != "0")
    except OSError as error:
        print(f"error: {disk_fault(error, shared_folders(config)) or error}", file=sys.stderr)
        return 2
    try:
        code = _told(config, work, run_dir, terminal, owns_run)
        if afterwards is not None and own_rank() == 0:
            afterwards(config, run_dir, terminal)
        return code
    finally:
        terminal.stop()
        del lock


def _prepare(run_dir: RunDir, readable_by: str, owns_run: bool) -> TextIO | None:
    """Makes the run's folder and removes the markers of an earlier start. The folder's lock, if this process takes it;
    None on the other ranks, and for work that does not own the run."""
    run_dir.make(readable_by)
    try:
        lock = hold_lock(run_dir.path) if owns_run and own_rank() == 0 else None
    except (OSError, UserError) as error:
        raise UserError(f"run.dir={run_dir.path} cannot be used: {error}; set another run.dir") from error
    if own_rank() == 0:
        run_dir.clear(PREEMPTED, FAILED, *([DONE] if owns_run else []))
    return lock


def _told(config: RunConfig, work: Work, run_dir: RunDir, terminal: Terminal, owns_run: bool) -> int:
    """The exit code; what failed is told, and marked in the run's folder."""
    try:
        return _work(config, work, run_dir, terminal, owns_run)
    except UserError as error:
        return _fail(run_dir, terminal, str(error), 2)
    except KeyboardInterrupt:
        return _fail(run_dir, terminal, "interrupted; the same command goes on from the last checkpoint", 130)
    except FloatingPointError as error:                  # says of what, and where that is kept
        return _fail(run_dir, terminal, str(error), 1)
    except Exception as error:
        logging.getLogger(__name__).error("%s", traceback.format_exc())
        if told := disk_fault(error, shared_folders(config)):
            return _fail(run_dir, terminal, told, 2)
        lost = lost_peer(error, config.cluster)
        if lost and (number := run_dir.preempted_by()) is not None:         # the peer was told to end, and did so
            return stop_now(config, terminal, signal.Signals(number))
        what = lost or f"{type(error).__name__}: {error}"
        return _fail(run_dir, terminal, f"{what} (rank {own_rank()}, see {run_dir.rank_log(own_rank())})", 1,
                     lost is not None)


def stop_now(config: RunConfig, terminal: Terminal, number: signal.Signals) -> NoReturn:
    """Ends this process, which was sent this signal before anything was done that could be lost. Peers that wait for it
    find the marker."""
    stopped, run_dir = Stopped(number, "no work that was under way is lost"), RunDir(config.run_dir)
    if run_dir.failure() is not None:                            # who started the ranks ends them, as one has failed
        exit_with(1)
    run_dir.mark_preempted(str(stopped), stopped.signal)
    terminal.say(str(stopped))
    exit_with(stopped.exit_code)


def _work(config: RunConfig, work: Work, run_dir: RunDir, terminal: Terminal, owns_run: bool) -> int:
    world = World.start(config.cluster)
    # ranks that were started with different configs would wait for each other forever
    if len(set(world.gather(json.dumps(to_dict(config), sort_keys=True)))) > 1:
        raise UserError("the ranks were started with different overrides; give every node the same command")
    try:
        with watching(run_dir.rank_log(world.rank), config.cluster.timeout_seconds):
            work(config, world, terminal)
    except Stopped as stopped:
        if world.is_main:
            run_dir.mark_preempted(str(stopped), stopped.signal)
            terminal.say(str(stopped))
        world.barrier()                                          # if a rank left sooner, the others would fail
        return stopped.exit_code
    if owns_run and world.is_main:
        run_dir.mark_done()
    world.barrier()
    return 0


def _fail(run_dir: RunDir, terminal: Terminal, message: str, code: int, lost: bool = False) -> int:
    logging.getLogger(__name__).error("%s", message)
    node, local_rank = own_node()
    is_first = run_dir.mark_failed(Failure(message, code, own_rank(), node, lost), first_only=True)
    if is_first or (local_rank == 0 and not _node_has_spoken(run_dir, node)):
        terminal.error(f"error: {message}")
    return code


def _node_has_spoken(run_dir: RunDir, node: int) -> bool:
    """Whether the rank that failed first, and told the person, is one of this node."""
    for _ in range(20):
        if (failure := run_dir.failure()) is not None:
            return failure.node == node
        # the marker is being written, or removed, at this moment
        time.sleep(0.05)
    return False
