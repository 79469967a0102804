"""What the next step needs is made by a thread while this step is computed."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(make: Callable[[int], T], first: int, last: int) -> Iterator[Iterator[tuple[int, T]]]:
    """An iterator of (step, make(step)) for steps first to last. It makes one step ahead: at most two exist at once."""
    with ThreadPoolExecutor(1) as thread:
        yield _in_turn(thread, make, first, last)


def _in_turn(thread: ThreadPoolExecutor, make: Callable[[int], T], first: int, last: int) -> Iterator[tuple[int, T]]:
    coming = thread.submit(make, first) if first <= last else None
    for step in range(first, last + 1):
        assert coming is not None
        made = coming.result()
        coming = thread.submit(make, step + 1) if step < last else None
        yield step, made
