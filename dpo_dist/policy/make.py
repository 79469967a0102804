"""RunConfig → the Policy that it asks for."""
from __future__ import annotations

from typing import Any

import torch

from dpo_dist.config.adapter import Adapter
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.models.checkpointing import checkpoint_layers
from dpo_dist.models.load import ScoredModel, torch_dtype
from dpo_dist.models.lora import REFERENCE, add_adapter, add_lora, load_adapted
from dpo_dist.models.quantized import adapters_in
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.policy import Policy
from dpo_dist.policy.optimizers.make import optimizer_module
from dpo_dist.policy.single import SinglePolicy
from dpo_dist.runtime.world import World


def make_policy(config: RunConfig, folder: ModelFolder, attention: str, world: World, fused: bool = False,
                beside: Adapter | None = None) -> Policy:
    """The policy with its starting weights from `folder`, ready to train. fused: as in load_causal_lm. beside: an
    adapter of the reference's, frozen, for Policy.reference_adapter."""
    dtype = torch_dtype(config.model, world.device)
    optimizer_module(config.optim)                       # may lack a library, which is told before the model is loaded

    def load_model() -> ScoredModel:
        lm: Any = load_adapted(folder, dtype, attention, fused, config.model.quantization)
        wrapped = add_lora(lm, config.model.lora, config.train.seed) if config.model.lora.rank else lm
        if beside is not None:
            wrapped = add_adapter(wrapped, beside, REFERENCE)
        if config.model.quantization != "none":
            adapters_in(dtype, wrapped)
        assert config.model.gradient_checkpointing != "auto", "chosen before the policy is made (sizing/automatic.py)"
        # last: peft looks for checkpointing, and would give embeddings gradients
        checkpoint_layers(wrapped, config.model.gradient_checkpointing)
        return ScoredModel(wrapped, attention)

    if config.zero.stage == 0 and dtype == torch.bfloat16:
        raise UserError(f"model.dtype={config.model.dtype} is bf16 here, which needs fp32 master weights, which "
                        "DeepSpeed's zero.stage=0 has not; set zero=zero1 (or higher), or zero=none in one process, or "
                        "model.dtype=fp32")
    if config.zero.stage is None:
        if world.size > 1:
            raise UserError(f"zero.stage=null is plain torch in one process, but {world.size} were started; set "
                            "zero=zero3")
        return SinglePolicy(load_model(), config.optim, world.device)
    from dpo_dist.policy.zero import ZeroPolicy  # deepspeed is imported only where it is used

    return ZeroPolicy(load_model, config.zero, config.optim, dtype, world)
