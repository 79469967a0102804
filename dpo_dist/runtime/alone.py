"""How a command's one process begins and ends where it computes nothing with torch: as process.py, without ranks, and
half a second after its start."""
from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import huggingface_hub.constants

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime import preemption
from dpo_dist.runtime.disk_faults import disk_fault
from dpo_dist.runtime.hub_commits import pin
from dpo_dist.runtime.preemption import Stopped
from dpo_dist.runtime.run_dir import FAILED, PREEMPTED, Failure, RunDir
from dpo_dist.runtime.shared_folders import shared_folders
from dpo_dist.runtime.terminal import Terminal

Work = Callable[[RunConfig, Terminal], None]
INTERRUPTED = 130


def run_alone(overrides: Sequence[str], work: Work) -> int:
    """Runs `work` in this process. 0 on success, 2 for a user's mistake, 1 otherwise; a failure is in
    <run.dir>/FAILED, a signal that stopped the work in <run.dir>/PREEMPTED, as process.run_entry leaves them."""
    gc.enable()
    try:
        config = compose(overrides)
        run_dir = RunDir(config.run_dir)
        run_dir.make(config.run.readable_by)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pin(run_dir.hub_commits())
    # Hugging Face's libraries read the variable when they are imported. That may be over by now, so both are set.
    os.environ["HF_HUB_OFFLINE"] = "1" if config.run.offline else "0"
    huggingface_hub.constants.HF_HUB_OFFLINE = config.run.offline
    try:
        run_dir.clear(PREEMPTED, FAILED)
        terminal = Terminal.start(str(run_dir.rank_log(0)), is_main=True,
                                  capture=os.environ.get("DPO_DIST_CAPTURE") != "0")
    except OSError as error:
        print(f"error: {disk_fault(error, shared_folders(config)) or error}", file=sys.stderr)
        return 2
    preemption.listen()
    try:
        work(config, terminal)
        return 0
    except Stopped as stopped:
        run_dir.mark_preempted(str(stopped), stopped.signal)
        terminal.say(str(stopped))
        return stopped.exit_code
    except UserError as error:
        return _fail(run_dir, terminal, str(error), 2)
    except KeyboardInterrupt:
        return _fail(run_dir, terminal, "interrupted; the same command begins again", INTERRUPTED)
    except Exception as error:
        logging.getLogger(__name__).error("%s", traceback.format_exc())
        if told := disk_fault(error, shared_folders(config)):
            return _fail(run_dir, terminal, told, 2)
        return _fail(run_dir, terminal, f"{type(error).__name__}: {error} (see {run_dir.rank_log(0)})", 1)
    finally:
        terminal.stop()


def _fail(run_dir: RunDir, terminal: Terminal, message: str, code: int) -> int:
    run_dir.mark_failed(Failure(message, code))
    terminal.error(f"error: {message}")
    return code
