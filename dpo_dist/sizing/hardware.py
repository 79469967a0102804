"""What ranks run on, and what is assumed of it. The CPU's figures were measured (benchmarks/sizing.py), the GPU's were
not."""
from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What one rank runs on, and what is assumed of it."""

    name: str
    measured: bool
    memory: float                    # bytes a rank may hold
    host_memory: float               # bytes of the node's CPU memory that a rank may use, for offloading
    # bytes that libraries take at first use, beside the model: contexts, workspaces, communicators
    framework: float
    flops: float                     # a second, the matrix units' peak
    efficiency: float                # share of that peak which a step's matrix products reach
    bandwidth: float                 # bytes a second of the rank's memory, for the optimizer's pass over its state
    host_bandwidth: float            # the same of the CPU memory that offloading uses, for one rank's share of the host
    link: float                      # bytes a second that a rank sends, and receives, in a collective inside a node
    node_link: float                 # the same across nodes
    latency: float                   # seconds a collective takes however little it moves
    overlaps: bool                   # communication behind computation
    whole_buckets: bool              # a buffer costs what is asked for (GPU), not what is touched (CPU)
    # copies of attention's output that are kept; 2 where branches are computed in turn and joined
    pieces: int
    masks: bool                      # attention over a branch keeps its mask
    flat_copies: int                 # of a bucket in ZeRO-3's reduce-scatter: interleaved by rank, and gloo's own
    # of link, which is an all-reduce's: what ZeRO-3's gathers and scatters reach, copies among them
    sharded_share: float
    hook: float                      # seconds of Python that ZeRO-3 adds to a layer's pass, where nothing hides it


CPU = Device(
    "CPU core", measured=True, memory=math.inf, host_memory=math.inf, framework=24e6, flops=1.0e11, efficiency=0.75,
    bandwidth=5e9, host_bandwidth=5e9, link=1e9, node_link=1e9, latency=3e-4, overlaps=False, whole_buckets=False,
    pieces=2, masks=True, flat_copies=2, sharded_share=0.25, hook=1e-3)
GPU_80GB = Device(
    "GPU of 80 GB", measured=False, memory=80e9, host_memory=200e9, framework=4e9, flops=989e12, efficiency=0.40,
    bandwidth=2.5e12, host_bandwidth=20e9, link=300e9, node_link=40e9, latency=3e-5, overlaps=True, whole_buckets=True,
    pieces=1, masks=False, flat_copies=1, sharded_share=1.0, hook=0.0)


@dataclass(frozen=True)
class Hardware:
    """Ranks, and the device that each has."""

    nodes: int
    ranks: int
    device: Device

    @property
    def link(self) -> float:
        return self.device.link if self.nodes == 1 else self.device.node_link
