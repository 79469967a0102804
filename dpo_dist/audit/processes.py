"""read_share by several processes: forked, each with its share of the rows, and what they gave as one."""
from __future__ import annotations

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from dpo_dist.audit.reading import Read, read_share, sources_of
from dpo_dist.audit.tokens import ROWS_LOOKED_AT
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.files import read_records
from dpo_dist.data.locate import data_bytes
from dpo_dist.data.rows import Share
from dpo_dist.runtime import preemption
from dpo_dist.runtime.cores import usable_cores
from dpo_dist.runtime.preemption import Stopped
from dpo_dist.runtime.rank import PR_SET_PDEATHSIG
from dpo_dist.runtime.terminal import Terminal

BYTES_A_PROCESS = 4 << 20                    # about 5 s of one process's work
SECONDS_BETWEEN_LOOKS = 0.1
STOPPED = "nothing of the audit is kept"


def read_all(config: RunConfig, tokenizer: Any | None, terminal: Terminal) -> Read:
    """What all data sets hold. Raises UserError, and Stopped where a signal has come."""
    worth = sum(data_bytes(source.config) for source in sources_of(config)) // BYTES_A_PROCESS
    parts = max(1, min(len(usable_cores()), worth))
    if not worth:
        return read_share(config, tokenizer, Share(), lambda done: _stop_if_asked())
    total = sum(1 for source in sources_of(config) for _ in read_records(source.config, lambda record: False))
    # read, and then tokenized: all of them, or so many
    with terminal.progress(total + min(total, ROWS_LOOKED_AT), description="audit") as bar:
        shown = 0

        def tell(done: int) -> None:
            nonlocal shown
            _stop_if_asked()
            if done > shown:
                bar.update(done)
                shown = done

        return _in_processes(config, tokenizer, parts, tell) if parts > 1 else read_share(config, tokenizer, Share(),
                                                                                          tell)


def _stop_if_asked() -> None:
    if number := preemption.received():
        raise Stopped(number, STOPPED)


def _in_processes(config: RunConfig, tokenizer: Any | None, parts: int, show: Callable[[int], None]) -> Read:
    fork = get_context("fork")                           # what is imported is shared
    done = fork.RawArray("q", parts)
    ends: list[tuple[Any, Connection]] = []
    gc.freeze()
    try:
        for part in range(parts):
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, args=(config, tokenizer, Share(part, parts), done, theirs))
            process.start()
            theirs.close()
            ends.append((process, ours))
        return _gathered(ends, done, show)
    finally:
        for process, _ in ends:
            process.kill()
            process.join()


def _work(config: RunConfig, tokenizer: Any | None, share: Share, done: Any, out: Connection) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for heard in preemption.HEARD:                       # the parent hears them, and ends this process
        signal.signal(heard, signal.SIG_IGN)
    # there is a process for each core
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")

    def tell(n: int) -> None:
        done[share.part] = n

    try:
        out.send(read_share(config, tokenizer, share, tell))
    except UserError as error:
        out.send(error)


def _gathered(ends: list[tuple[Any, Connection]], done: Any, show: Callable[[int], None]) -> Read:
    found: dict[int, Read] = {}
    while len(found) < len(ends):
        show(sum(done))
        for part, (process, pipe) in enumerate(ends):
            if part in found:
                continue
            if pipe.poll():
                answer = _received(pipe, process)
                if isinstance(answer, UserError):
                    raise answer
                found[part] = answer
            elif process.exitcode is not None and not pipe.poll():
                raise RuntimeError(f"a process of the audit ended with code {process.exitcode}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    show(sum(done))
    first = found[0]
    for part in range(1, len(ends)):
        first.join(found[part])
    return first


def _received(pipe: Connection, process: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process of the audit ended with code {process.exitcode}") from None
