"""vllm: the reference in servers, which are there already or are started by the run."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import VALUES, option
from dpo_dist.config.reference import OutsideConfig

if TYPE_CHECKING:
    from dpo_dist.config.schema import RunConfig


@dataclass(frozen=True)
class RequestsConfig:
    sequences: int = option(above=0)
    at_once: int = option(above=0)
    timeout_seconds: float = option(above=0)
    wait_seconds: float = option(above=0)


@dataclass(frozen=True)
class VllmConfig(OutsideConfig):
    engine: Literal["vllm"] = option()
    urls: tuple[str, ...] | str = option(VALUES)
    server: str | None = option(VALUES)
    nodes: int | None = option(above=0)
    tensor_parallel_size: int | None = option(above=0)
    served_name: str | None = option()
    version: str | None = option(VALUES)
    quantization: str | None = option(VALUES)
    requests: RequestsConfig = option()

    @property
    def computes_quantized(self) -> bool:
        return True                                      # its servers have kernels of their own

    @property
    def server_nodes(self) -> int:
        return self.nodes or 0

    @property
    def server_gpus(self) -> int:
        return self.tensor_parallel_size or 1

    def weight_share(self, piece: float, nodes: int, ranks: int, policy_is_sharded: bool) -> float:
        return 0.0

    def check(self, run: RunConfig) -> None:
        if self.tensor_parallel_size is not None and not self.server:
            raise UserError(f"reference.tensor_parallel_size={self.tensor_parallel_size} does nothing with "
                            "reference.engine=vllm and no reference.server, which it is for; remove it, or set "
                            "reference.server")
        # for servers on their own nodes, the job itself adds the URLs
        if self.urls and self.server and not self.nodes:
            raise UserError(f"reference.urls={self.urls} and reference.server={self.server} are both set; keep one of "
                            "them")
        if self.nodes and not self.server:
            raise UserError(f"reference.nodes={self.nodes} needs servers to start there; set reference.server to the "
                            "python of an environment that holds vLLM")
        if self.nodes and not run.cluster.submits:
            raise UserError(f"reference.nodes={self.nodes} are nodes that Slurm gives; set cluster=slurm, or start the "
                            "servers and set reference.urls")
        if self.server and len(self.server.split()) > 1 and "{port}" not in self.server:
            raise UserError(f"reference.server={self.server} has no {{port}}, so nobody knows where it would listen; "
                            "write --port {port}")
        if self.requests.wait_seconds >= run.cluster.timeout_seconds:
            raise UserError(f"reference.requests.wait_seconds={self.requests.wait_seconds} must be less than "
                            f"cluster.timeout_seconds={run.cluster.timeout_seconds}, after which the other ranks give "
                            "up; lower it")
