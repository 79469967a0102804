"""ReferenceConfig → the ReferenceEngine that it asks for."""
from __future__ import annotations

from pathlib import Path

import torch

from dpo_dist.config.schema import ReferenceConfig
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.adapter_off import AdapterOffReference, HasAdapters
from dpo_dist.reference.hf import HfReference
from dpo_dist.runtime.world import World


def make_reference(config: ReferenceConfig, folder: Path, dtype: torch.dtype, attention: str, world: World,
                   policy: HasAdapters | None = None, fused: bool = False) -> ReferenceEngine:
    """The engine with the frozen weights from `folder`; adapter_off takes the policy's own. fused: as in load_causal_lm; where layers are
    split, or read from disk one at a time, the model's own code computes."""
    if config.engine == "adapter_off":
        assert policy is not None, "adapter_off scores with the policy"
        return AdapterOffReference(policy)
    if config.engine == "hf":
        return HfReference(folder, dtype, attention, world.device, config.offload, fused)
    if config.engine == "tensor_parallel":               # deepspeed is imported only where it is used
        from dpo_dist.reference.tensor_parallel import TensorParallelReference

        return TensorParallelReference(folder, dtype, attention, world, config.tensor_parallel_size)
    from dpo_dist.reference.zero import ZeroReference

    return ZeroReference(folder, dtype, attention, world.device, config.offload, fused)
