"""How every command's process begins and ends: config, log file, world; then one message and an exit code, never a bare traceback."""
from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import huggingface_hub.constants

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.lock import hold_lock
from dpo_dist.runtime.preemption import Stopped
from dpo_dist.runtime.process_defaults import set_defaults
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World, lost_peer, node_here, rank_here

Work = Callable[[RunConfig, World, Terminal], None]

DONE, PREEMPTED, FAILED = "DONE", "PREEMPTED", "FAILED"


def run_entry(overrides: Sequence[str], work: Work, owns_run: bool = False) -> int:
    """Runs `work` in the world that the environment describes. 0 on success, 2 for a user's mistake, 1 for anything else.

    The first rank to fail writes <run.dir>/FAILED with the message and the code, which torchrun would lose, and tells the person;
    of the others, one a node tells what it saw, as each node has a terminal of its own, and the rest only log. Work that was asked to stop
    leaves <run.dir>/PREEMPTED with the signal. `owns_run`: the work is the run itself: one process group at a time, and its success is
    <run.dir>/DONE.
    """
    set_defaults()
    try:
        config = compose(overrides)
    except UserError as error:
        return _fail_early(str(error))
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)
        lock = hold_lock(run_dir) if owns_run and rank_here() == 0 else None     # held until the process ends
    except (OSError, UserError) as error:
        return _fail_early(f"run.dir={run_dir} cannot be used: {error}; set another run.dir")
    if rank_here() == 0:
        _clear_markers(run_dir, [DONE, PREEMPTED, FAILED] if owns_run else [PREEMPTED, FAILED])
    _network(config.run.offline)
    terminal = Terminal.start(str(run_dir / "logs" / f"rank-{rank_here()}.log"), is_main=rank_here() == 0)
    try:
        world = World.start(config.cluster)
        _agree(config, world)
        work(config, world, terminal)
        if owns_run and world.is_main:
            (run_dir / DONE).touch()
        world.barrier()
        return 0
    except Stopped as stopped:
        if world.is_main:
            _mark_preempted(run_dir, stopped)
            terminal.say(str(stopped))
        world.barrier()                                  # a rank that left sooner would take the others with it
        return stopped.exit_code
    except UserError as error:
        return _fail(run_dir, terminal, str(error), 2)
    except KeyboardInterrupt:
        return _fail(run_dir, terminal, "interrupted; the same command goes on from the last checkpoint", 130)
    except Exception as error:
        logging.getLogger(__name__).error("%s", traceback.format_exc())
        what = lost_peer(error, config.cluster) or f"{type(error).__name__}: {error}"
        return _fail(run_dir, terminal, f"{what} (rank {rank_here()}, see {run_dir}/logs/rank-{rank_here()}.log)", 1)
    finally:
        terminal.stop()
        del lock


def exit_with(code: int) -> NoReturn:
    """Ends the process at once. Everything is on disk by now, and gloo's threads abort an ordinary exit now and then ("terminate
    called without an active exception"), which would turn a finished run into a failed one."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _network(offline: bool) -> None:
    """Hugging Face's libraries read the variable when they are imported, which may be over by now: tell both."""
    os.environ["HF_HUB_OFFLINE"] = "1" if offline else "0"
    huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _clear_markers(run_dir: Path, markers: Sequence[str]) -> None:
    for marker in markers:
        (run_dir / marker).unlink(missing_ok=True)


def _agree(config: RunConfig, world: World) -> None:
    """UserError where ranks were started with different configs: they would wait for each other for ever."""
    if len(set(world.gather(json.dumps(to_dict(config), sort_keys=True)))) > 1:
        raise UserError("the ranks were started with different overrides; give every node the same command")


def _mark_preempted(run_dir: Path, stopped: Stopped) -> None:
    partial = run_dir / f"{PREEMPTED}.tmp"
    partial.write_text(json.dumps({"message": str(stopped), "signal": stopped.signal}) + "\n")
    partial.rename(run_dir / PREEMPTED)


def _fail_early(message: str) -> int:
    """Before there is a log: every rank would say the same."""
    if rank_here() == 0:
        print(f"error: {message}", file=sys.stderr)
    return 2


def _fail(run_dir: Path, terminal: Terminal, message: str, code: int) -> int:
    logging.getLogger(__name__).error("%s", message)
    try:
        with (run_dir / FAILED).open("x") as f:
            json.dump({"message": message, "exit_code": code, "rank": rank_here(), "node": node_here()[0]}, f)
    except FileExistsError:
        if _spoken_here(run_dir):
            return code
    terminal.error(f"error: {message}")
    return code


def _spoken_here(run_dir: Path) -> bool:
    """True where a rank of this node has told the person, or another one of it will."""
    node, local_rank = node_here()
    if local_rank != 0:
        return True
    for _ in range(20):
        try:
            return bool(json.loads((run_dir / FAILED).read_text())["node"] == node)
        except (OSError, ValueError):                    # being written, or removed, at this moment
            time.sleep(0.05)
    return False
