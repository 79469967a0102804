"""The reference's engines. Each file describes one without torch: its keys, rules, cache recipe and memory.

What computes is `open_engine` in dpo_dist/reference/<name>.py, imported when it is used.
"""
from __future__ import annotations

from dpo_dist.config.engines.adapter import AdapterReferenceConfig
from dpo_dist.config.engines.adapter_off import AdapterOffConfig
from dpo_dist.config.engines.hf import HfConfig
from dpo_dist.config.engines.tensor_parallel import TensorParallelConfig
from dpo_dist.config.engines.vllm import VllmConfig
from dpo_dist.config.engines.zero import ZeroReferenceConfig
from dpo_dist.config.reference import ReferenceConfig

ENGINES: dict[str, type[ReferenceConfig]] = {
    "hf": HfConfig,
    "zero": ZeroReferenceConfig,
    "tensor_parallel": TensorParallelConfig,
    "adapter_off": AdapterOffConfig,
    "adapter": AdapterReferenceConfig,
    "vllm": VllmConfig,
}
