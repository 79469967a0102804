"""Loading sharded over the ranks, and making a model apart from that."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

_alive: list[HfDeepSpeedConfig] = []                     # transformers looks at it as long as it lives


@contextmanager
def sharded_load(config: dict[str, Any]) -> Iterator[None]:
    """Inside, models are loaded as this DeepSpeed configuration says: with ZeRO-3 no rank ever holds a whole one."""
    _alive.append(HfDeepSpeedConfig(config))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        _alive.clear()


@contextmanager
def apart_from_sharding() -> Iterator[None]:
    """Inside, models are made whole, by this rank alone, also within sharded_load."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if _alive:
            set_hf_deepspeed_config(_alive[-1])
