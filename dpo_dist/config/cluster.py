"""Where a run's processes are started: the keys of all clusters, and those of each one. launcher/ starts them."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import option

NETWORK_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")


@dataclass(frozen=True)
class ClusterConfig:
    name: str = option()
    nodes: int = option(above=0)
    procs_per_node: int | None = option(above=0)
    device: Literal["auto", "cpu", "cuda"] = option()
    timeout_seconds: int = option(above=0)
    max_restarts: int = option()
    peak_tflops: float | None = option(above=0)
    environment: dict[str, str] | None = option()
    jobs_at_once: int | None = option(above=0)

    # stages become jobs of a batch system, on other machines
    submits: ClassVar[bool] = False

    def check(self, server_nodes: int) -> None:
        """UserError for what contradicts itself. server_nodes: of the reference (ReferenceConfig.server_nodes)."""
        if self.max_restarts < 0:
            raise UserError(f"cluster.max_restarts={self.max_restarts} must be 0 (never) or greater")
        for name in self.environment or {}:
            if not name.startswith(NETWORK_VARIABLES):
                raise UserError(f"cluster.environment.{name} is not a setting of the network between ranks (those "
                                f"begin with {', '.join(NETWORK_VARIABLES)}); set it in the shell, or in "
                                "cluster.slurm.setup")


@dataclass(frozen=True)
class LocalConfig(ClusterConfig):
    """Processes on this machine."""

    name: Literal["local"] = option()

    def check(self, server_nodes: int) -> None:
        super().check(server_nodes)
        if self.nodes > 1:
            raise UserError(f"cluster.nodes={self.nodes} with cluster=local: one machine cannot start others; take "
                            "cluster=slurm, or run launch/node.sh on each machine (or launch/hosts.sh once) and leave "
                            "cluster.nodes out")


@dataclass(frozen=True)
class SlurmConfig:
    partition: str | None = option()
    account: str | None = option()
    qos: str | None = option()
    time_limit: str | None = option()
    signal_seconds: int = option(above=0)
    max_requeues: int = option()
    exclude: str | None = option()
    container_image: str | None = option()
    container_mounts: tuple[str, ...] = option()
    preflight: bool = option()
    setup: tuple[str, ...] = option()
    extra: tuple[str, ...] = option()
    server_extra: tuple[str, ...] = option()


@dataclass(frozen=True)
class SlurmClusterConfig(ClusterConfig):
    """Stages as Slurm jobs."""

    name: Literal["slurm"] = option()
    min_nodes: int | None = option(above=0)
    slurm: SlurmConfig = option()

    submits = True

    def check(self, server_nodes: int) -> None:
        super().check(server_nodes)
        slurm = self.slurm
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise UserError(f"cluster.min_nodes={self.min_nodes} is more than cluster.nodes={self.nodes}; lower it, or "
                            "set it to null")
        if self.procs_per_node is None:
            raise UserError("cluster.procs_per_node=null: from here the nodes' devices cannot be counted; set "
                            "cluster.procs_per_node=8, one a GPU")
        if slurm.max_requeues < 0:
            raise UserError(f"cluster.slurm.max_requeues={slurm.max_requeues} must be 0 (never) or greater")
        if slurm.container_mounts and slurm.container_image is None:
            raise UserError(f"cluster.slurm.container_mounts={slurm.container_mounts} does nothing without "
                            "cluster.slurm.container_image; set it")
        if slurm.server_extra and not server_nodes:
            raise UserError(f"cluster.slurm.server_extra={list(slurm.server_extra)} is for the nodes of "
                            "reference.nodes, which is not set; remove it, or set reference.nodes")
        for key, lines in (("extra", slurm.extra), ("server_extra", slurm.server_extra)):
            for line in lines:
                if not line.startswith("-"):
                    raise UserError(f"cluster.slurm.{key} has '{line}', which is not an option of sbatch; write it as "
                                    "in '--cpus-per-task=16'")


CLUSTERS: dict[str, type[ClusterConfig]] = {"local": LocalConfig, "slurm": SlurmClusterConfig}
