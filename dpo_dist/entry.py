"""How every command's process begins and ends: config, log file, world; then one message and an exit code, never a bare traceback."""
from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import huggingface_hub.constants

from dpo_dist.compose import compose
from dpo_dist.config import RunConfig, UserError
from dpo_dist.terminal import Terminal
from dpo_dist.world import World, rank_here

Work = Callable[[RunConfig, World, Terminal], None]

DONE, FAILED = "DONE", "FAILED"


def run_entry(overrides: Sequence[str], work: Work, marks_run: bool = True) -> int:
    """Runs `work` in the world that the environment describes. 0 on success, 2 for a user's mistake, 1 for anything else.

    The first rank to fail writes <run.dir>/FAILED with the message and the code, which torchrun would lose, and tells the person;
    the others only log. `marks_run`: whether success is written as <run.dir>/DONE.
    """
    try:
        config = compose(overrides)
    except UserError as error:
        if rank_here() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    _network(config.run.offline)
    terminal = Terminal.start(str(run_dir / "logs" / f"rank-{rank_here()}.log"), is_main=rank_here() == 0)
    try:
        world = World.start(config.cluster)
        world.on_main(lambda: _clear_markers(run_dir))
        work(config, world, terminal)
        if marks_run and world.is_main:
            (run_dir / DONE).touch()
        world.barrier()
        return 0
    except UserError as error:
        return _fail(run_dir, terminal, str(error), 2)
    except KeyboardInterrupt:
        return _fail(run_dir, terminal, "interrupted; the same command goes on from the last checkpoint", 130)
    except Exception as error:
        logging.getLogger(__name__).error("%s", traceback.format_exc())
        where = f"rank {rank_here()}, see {run_dir}/logs/rank-{rank_here()}.log"
        return _fail(run_dir, terminal, f"{type(error).__name__}: {error} ({where})", 1)
    finally:
        terminal.stop()


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


def _clear_markers(run_dir: Path) -> None:
    for marker in (DONE, FAILED):
        (run_dir / marker).unlink(missing_ok=True)


def _fail(run_dir: Path, terminal: Terminal, message: str, code: int) -> int:
    logging.getLogger(__name__).error("%s", message)
    try:
        with (run_dir / FAILED).open("x") as f:
            json.dump({"message": message, "exit_code": code}, f)
    except FileExistsError:
        return code                                      # another rank has spoken
    terminal.error(f"error: {message}")
    return code
