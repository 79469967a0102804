"""ZeroConfig and OptimConfig → DeepSpeed's configuration. Pure."""
from __future__ import annotations

from typing import Any

from dpo_dist.config.schema import OptimConfig, ZeroConfig
from dpo_dist.sizing.estimate import bucket_elements


def deepspeed_config(zero: ZeroConfig, optim: OptimConfig, bf16: bool, on_gpu: bool, layer: int = 0) -> dict[str, Any]:
    """The loop scales losses and marks the last micro-step itself, so micro-batch and accumulation are 1 here.

    `layer`: elements of a decoder layer, from which the sizes of buckets follow; 0 where it is not known yet (while the
    model loads).
    """
    bucket = bucket_elements(layer, on_gpu)
    stage: dict[str, Any] = {"stage": zero.stage, "overlap_comm": on_gpu, "contiguous_gradients": True,
                             "reduce_bucket_size": bucket}
    if zero.offload_optimizer == "cpu":
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if zero.stage == 3:
        stage["stage3_param_persistence_threshold"] = zero.persistence_threshold
        stage["stage3_prefetch_bucket_size"] = bucket
        if zero.offload_parameters == "cpu":
            stage["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
        if zero.secondary_partition is not None:                  # hpZ (arXiv 2306.10209, section 3.2)
            stage["zero_hpz_partition_size"] = zero.secondary_partition
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm or 0.0,          # unset, DeepSpeed clips at 1.0
        "zero_allow_untested_optimizer": True,                    # torch's AdamW: nothing to compile
        "zero_force_ds_cpu_optimizer": False,
        # the loop looks at loss and norm itself, without a pause in each step
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        # many micro-steps add up to one gradient
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        **({"communication_data_type": "fp32"} if zero.reduce_dtype == "fp32" else {}),
        "zero_optimization": stage,
        "wall_clock_breakdown": False,
        # it waits for the device at every forward and step; perf.py has a clock
        "timers": {"throughput": {"enabled": False}},
    }
