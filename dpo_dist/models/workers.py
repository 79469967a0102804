"""Processes that forward a plain transformers model, one a core, or one a GPU. On a CPU that is faster than one process
with as many threads, and by far where the cores are shared."""
from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from dpo_dist.runtime.cores import usable_cores
from dpo_dist.runtime.rank import PR_SET_PDEATHSIG
from dpo_dist.runtime.terminal import Terminal

T = TypeVar("T")


@contextmanager
def workers(gpus: int = 0) -> Iterator[Executor]:
    """As many processes as there are GPUs for them, each with one of its own; without any, as there are usable cores.
    Each is started when there is work for it."""
    context = get_context("spawn")
    with ProcessPoolExecutor(gpus or len(usable_cores()), mp_context=context, initializer=_start,
                             initargs=(gpus, context.Value("i", 0))) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def as_done(pool: Executor, work: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """work(*task) of each task, in the order in which workers end them. What work raises is raised here."""
    for done in as_completed([pool.submit(work, *task) for task in tasks]):
        yield done.result()


def fill(files: Mapping[Path, tuple[Any, ...]], work: Callable[..., None], pool: Executor, terminal: Terminal,
         what: str) -> None:
    """Has each file written that is not there yet, by work(*task). files: {file: its task}; what: for the bar."""
    missing = [task for file, task in files.items() if not file.exists()]
    known = len(files) - len(missing)
    with terminal.progress(len(files), known, what) as bar:
        for done, _ in enumerate(as_done(pool, work, missing), known + 1):
            bar.update(done)


def _start(gpus: int, started: Any) -> None:
    """started: how many processes there are already, which all of them share."""
    import torch

    if gpus:
        with started.get_lock():
            torch.set_default_device(torch.device("cuda", started.value % gpus))
            started.value += 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C ends it without a word
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    torch.set_num_threads(1)
    quiet()


def quiet() -> None:
    """Keeps the libraries' own output from the terminal, and them from the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TQDM_DISABLE"] = "1"                    # reading a GGUF file shows a bar of its own
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@cache
def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, which pads on the left, where prompts are padded."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)


@lru_cache(maxsize=2)                       # a policy and its reference
def model_of(folder: Path, dtype: str = "float32") -> Any:
    """The folder's model, on this process's device."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True,
                                                 trust_remote_code=False)
    return model.to(torch.get_default_device()).eval()
