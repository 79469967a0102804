"""ZeroConfig and OptimConfig → DeepSpeed's configuration. Pure."""
from __future__ import annotations

from typing import Any

from dpo_dist.config import OptimConfig, ZeroConfig


def deepspeed_config(zero: ZeroConfig, optim: OptimConfig, bf16: bool, on_gpu: bool) -> dict[str, Any]:
    """The loop scales losses and marks the last micro-step itself, so micro-batch and accumulation are 1 here."""
    stage: dict[str, Any] = {"stage": zero.stage, "overlap_comm": on_gpu, "contiguous_gradients": True}
    if zero.offload_optimizer == "cpu":
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if zero.stage == 3:
        stage["stage3_param_persistence_threshold"] = zero.persistence_threshold
        if zero.offload_parameters == "cpu":
            stage["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm or 0.0,          # unset, DeepSpeed clips at 1.0
        "zero_allow_untested_optimizer": True,                    # torch's AdamW: nothing to compile
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),        # many micro-steps add up to one gradient
        "zero_optimization": stage,
        "wall_clock_breakdown": False,
    }
