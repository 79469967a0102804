"""World: this process among the others, and how they communicate. Only this reads RANK and calls torch.distributed."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dpo_dist.config.cluster import ClusterConfig
from dpo_dist.config.errors import UserError
from dpo_dist.runtime import preemption
from dpo_dist.runtime.ports import free_port
from dpo_dist.runtime.process_defaults import keep_freed_memory
from dpo_dist.runtime.watchdog import watched

T = TypeVar("T")

all_reduce, all_gather_object = watched(dist.all_reduce), watched(dist.all_gather_object)
broadcast_object_list, all_to_all_single = watched(dist.broadcast_object_list), watched(dist.all_to_all_single)
SECONDS_BETWEEN_SIGNS = 1.0                # of life, from a rank at work to those that wait for it
NO_ANSWER = ("Timed out waiting", "Application timeout",     # gloo: of this collective, or another with that rank
             "Watchdog caught collective operation timeout",                              # NCCL
             "wait timeout after")                                                        # the store
PEER_GONE = ("Connection closed by peer", "Connection reset by peer",                     # gloo
             "remote process exited or there was a network error", "ncclRemoteError",     # NCCL, in two spellings
             "remote process exiting prematurely", "Connection closed by remote peer",    # its words, its last error
             "Connection was likely closed")                                              # the store, without rank 0


@dataclass(frozen=True)
class Team:
    """Consecutive ranks that work as one, including this one. All of them call each method, in the same order."""

    rank: int                                  # this process's place among `size`
    size: int
    group: Any                                 # torch's process group, for libraries that ask for one

    def gather(self, value: T) -> list[T]:
        """Every member's value, in order of rank, on every member."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        all_gather_object(out, value, group=self.group)
        return out


@dataclass(frozen=True)
class World:
    """One process among `size`; every method that talks must be called by all of them, in the same order."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1                        # processes on this machine

    @classmethod
    def start(cls, cluster: ClusterConfig) -> World:
        """Joins the processes that torchrun (or the launcher) started; a process started alone is a world of one."""
        os.environ.update(cluster.environment or {})                  # NCCL and gloo read theirs when the group starts
        rank, size = own_rank(), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if cluster.procs_per_node not in (None, local_size):
            raise UserError(f"cluster.procs_per_node={cluster.procs_per_node}, but {local_size} processes were started "
                            "on this machine; leave it out under torchrun, or start as many")
        device = device_of(cluster, local_rank)
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"                     # read by DeepSpeed when it is imported
            keep_freed_memory()
        if size == 1 and "RANK" not in os.environ:            # DeepSpeed wants a group even for one process
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1",
                              LOCAL_RANK="0")
        if not dist.is_initialized():
            timeout = timedelta(seconds=cluster.timeout_seconds)
            # of groups that DeepSpeed makes: torch would give those half an hour, or 10 minutes under nccl
            distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=timeout)
        return cls(rank, size, local_rank, device, local_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all ranks, float64, on the CPU."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        all_reduce(total)
        return total

    def on_device_sum(self, value: float) -> float:
        """The sum over all ranks, by the way that gradients take: nccl on GPUs, else gloo."""
        total = torch.tensor(value, dtype=torch.float32, device=self.device)
        all_reduce(total)
        return total.item()

    def any_on_device(self, flag: torch.Tensor) -> torch.Tensor:
        """1 where the flag, a bool scalar on the device, is true on any rank, else 0: a float32 scalar there. On GPUs
        no process waits for it."""
        highest = flag.float()
        all_reduce(highest, op=dist.ReduceOp.MAX)
        return highest

    def max(self, value: float) -> float:
        """The largest of the ranks' values."""
        largest = torch.tensor(value, dtype=torch.float64)
        all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def heed_signals(self, kept: str) -> None:
        """Raises Stopped, on all ranks alike, where any of them was sent a signal. kept: what is not lost by it."""
        if signal := self.max(preemption.received()):
            raise preemption.Stopped(signal, kept)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        out: list[Any] = [None] * self.size
        all_gather_object(out, value)
        return out

    def exchange(self, outgoing: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
        """What each rank sent this one, in order of rank: flat tensors of these lengths. outgoing: what goes to each
        rank, flat, on the device."""
        sent, dtype = torch.cat(outgoing), outgoing[0].dtype
        received = sent.new_empty(sum(lengths))
        width = dtype.itemsize                                       # gloo moves bytes, not bf16
        all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), [width * n for n in lengths],
                               [width * len(part) for part in outgoing])
        return list(received.split(lengths))

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work()` on rank 0, on every rank. An exception there is raised on all, so none waits.

        `work` may take as long as it likes: every second a thread of rank 0 tells the others that it is at it, so none
        is in one collective for longer. `work` itself must not communicate.
        """
        if self.size == 1:
            return work()
        if self.is_main:
            with _meanwhile(lambda: self._from_main(None)):
                outcome = _Outcome.of(work)
            self._from_main(outcome.for_others(self.rank))
            return outcome.value()
        told: _Outcome[T] | None = None
        while told is None:                                    # rank 0 is at work
            told = self._from_main(None)
        return told.value()

    def together(self, work: Callable[[], T]) -> list[T]:
        """The results of `work()` of all ranks, in order of rank, on every rank.

        They work at the same time, for as long as they like, as in `on_main`. An exception on one is raised on all,
        once each has ended its work.
        """
        if self.size == 1:
            return [work()]
        with _meanwhile(lambda: self._all_are_done(False)):
            outcome = _Outcome.of(work)
        while not self._all_are_done(True):
            pass
        outcomes = self.gather(outcome.for_others(self.rank))
        outcomes[self.rank] = outcome                          # with its own exception, which has the traceback
        for other in outcomes:                                 # of several exceptions, the same one on every rank
            if other.error is not None:
                raise other.error
        return [other.value() for other in outcomes]

    def _from_main(self, message: _Outcome[T] | None) -> _Outcome[T] | None:
        """Rank 0's message, on every rank."""
        messages = [message]
        broadcast_object_list(messages, src=0)
        return messages[0]

    def _all_are_done(self, done: bool) -> bool:
        """Whether every rank says so."""
        least = torch.tensor(done, dtype=torch.int64)
        all_reduce(least, op=dist.ReduceOp.MIN)
        return bool(least)

    def team(self, size: int) -> Team:
        """This rank's team where the world is cut into teams of `size` consecutive ranks; `size` divides the world."""
        group, _ = dist.new_subgroups(size)
        return Team(self.rank % size, size, group)

    def beside(self) -> Team:
        """All ranks as a team whose collectives, over gloo, may go on in a thread beside those of the world. They wait
        as long as a rank takes, and end with an error where one is gone. All ranks call it."""
        if self.size == 1:
            return Team(0, 1, None)
        self.barrier()                                   # fails where a rank is gone; new_group would wait for it
        return Team(self.rank, self.size, dist.new_group(backend="gloo", timeout=timedelta(days=7)))

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        all_reduce(torch.zeros(1))


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What became of a rank's work: what it returned, or what it raised."""

    result: T | None = None
    error: Exception | None = None

    @staticmethod
    def of(work: Callable[[], T]) -> _Outcome[T]:
        try:
            return _Outcome(work())
        except Exception as error:
            return _Outcome(error=error)

    def for_others(self, rank: int) -> _Outcome[T]:
        """The same as other ranks are told it: of exceptions, only a user's mistake and a stop can be sent as they
        are."""
        if self.error is None or isinstance(self.error, UserError | preemption.Stopped):
            return self
        return _Outcome(error=RuntimeError(f"rank {rank} failed: {type(self.error).__name__}: {self.error}"))

    def value(self) -> T:
        if self.error is not None:
            raise self.error
        return cast(T, self.result)


@contextmanager
def _meanwhile(say: Callable[[], object]) -> Iterator[None]:
    """While the block runs, a thread calls `say` every second. What it raises is raised once the block has ended."""
    over = Event()

    def speak() -> None:
        while not over.wait(SECONDS_BETWEEN_SIGNS):
            say()

    with ThreadPoolExecutor(1) as thread:
        speaking = thread.submit(speak)
        try:
            yield
        finally:
            over.set()
        speaking.result()


def own_rank() -> int:
    """This process's rank, known before any process group exists."""
    return int(os.environ.get("RANK", 0))


def own_node() -> tuple[int, int]:
    """(this process's node, its rank on that node), both from 0, as torchrun numbers them."""
    return int(os.environ.get("GROUP_RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))


def lost_peer(error: Exception, cluster: ClusterConfig) -> str | None:
    """What happened, where a collective failed because of another rank; None for any other error. There are no
    exception types for it, only gloo's, NCCL's and the store's words."""
    words = str(error)
    if any(part in words for part in NO_ANSWER):
        return (f"no answer from another rank for {cluster.timeout_seconds} s (cluster.timeout_seconds): a node, its "
                "network or a process on it is gone or hangs; where each rank stood is in its log")
    if any(part in words for part in PEER_GONE):
        return "another rank closed its connection: its process ended"
    if "NCCL communicator was aborted" in words:         # by NCCL's watchdog, which has told why in the log
        return (f"another rank ended, or did not answer for {cluster.timeout_seconds} s (cluster.timeout_seconds): "
                "its log says why")
    return None


def prepare_deepspeed(device: torch.device) -> None:
    """Switches off what DeepSpeed would do at its first use and nobody here needs. Called before that."""
    import deepspeed.ops  # only where DeepSpeed is used: the import takes seconds

    # it would compile a shared-memory op; gloo does that work, with the same numbers
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed imports its Muon optimizer to check whether ours is one. The decorators there would load torch's
    # compiler, which takes two seconds; nobody here calls what they decorate.
    compiling = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer
    except ImportError:                                  # another version of DeepSpeed has it elsewhere: only slower
        pass
    finally:
        torch.compile = compiling


def device_of(cluster: ClusterConfig, local_rank: int) -> torch.device:
    """Where a rank computes. UserError where the machine has no such device."""
    if cluster.device == "cpu" or (cluster.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("cluster.device=cuda, but torch sees no GPU here; set cluster.device=cpu or install a CUDA "
                        "build of torch")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"cluster.procs_per_node is more than the {torch.cuda.device_count()} GPUs of this machine; "
                        "lower it")
    return torch.device("cuda", local_rank)
