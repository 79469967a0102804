"""Where one process on a CPU trains faster than several: the line that says so. No torch here."""
from __future__ import annotations

from dataclasses import replace

from dpo_dist.config.schema import RunConfig, with_keys
from dpo_dist.sizing.estimate import GIB, memory
from dpo_dist.sizing.hardware import Hardware
from dpo_dist.sizing.lengths import Lengths
from dpo_dist.sizing.shape import ModelShape
from dpo_dist.sizing.step_time import step_time

# of a step's predicted time: predictions err, and threads share a product less evenly than processes share pairs
WORTH_SAYING = 0.9


def one_process_line(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware) -> str | None:
    """For a person whose processes share a machine's CPU: that one process with all its cores is predicted to be
    faster, in no more memory. None where it is not, where a key has no meaning there, or where there is nothing to
    choose. The stage is chosen already.
    """
    zero, device = config.zero, world.device
    only_sharded = (zero.offload_optimizer, zero.offload_parameters, zero.reduce_dtype) != ("none", "none", "auto")
    if (device.overlaps or world.nodes > 1 or world.ranks == 1 or config.cluster.submits or only_sharded
            or zero.secondary_partition is not None or config.reference.gathers_weights):
        return None
    ranks = world.ranks
    one = with_keys(config, {"zero.stage": None, "cluster.procs_per_node": 1})
    alone = Hardware(1, 1, replace(device, flops=ranks * device.flops, bandwidth=ranks * device.bandwidth))
    now, then = step_time(config, shape, lengths, world), step_time(one, shape, lengths, alone)
    held, holds = ranks * memory(config, shape, lengths, world).peak, memory(one, shape, lengths, alone).peak
    if then.seconds > WORTH_SAYING * now.seconds or holds > held:
        return None
    return (f"{ranks} processes send {ranks * now.sent / GIB:.2g} GiB a step to each other; one with all cores "
            f"(zero=none cluster.procs_per_node=1) is predicted to take {then.seconds:.2g} s a step, not "
            f"{now.seconds:.2g}, and {holds / GIB:.1f} GiB, not {held / GIB:.1f}")
