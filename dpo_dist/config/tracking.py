"""Where a run's numbers go besides metrics.jsonl. What sends them there is in run/tracking/."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_dist.config.options import option


@dataclass(frozen=True)
class TrackingConfig:
    name: str = option()


@dataclass(frozen=True)
class NoTracking(TrackingConfig):
    name: Literal["none"] = option()


@dataclass(frozen=True)
class TensorBoardConfig(TrackingConfig):
    name: Literal["tensorboard"] = option()


@dataclass(frozen=True)
class WandbConfig(TrackingConfig):
    name: Literal["wandb"] = option()
    project: str | None = option()
    entity: str | None = option()
    mode: Literal["online", "offline"] | None = option()


@dataclass(frozen=True)
class MlflowConfig(TrackingConfig):
    name: Literal["mlflow"] = option()
    uri: str | None = option()
    experiment: str = option()


TRACKERS: dict[str, type[TrackingConfig]] = {
    "none": NoTracking, "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "mlflow": MlflowConfig}
