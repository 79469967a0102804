#!/usr/bin/env bash
# Starts this node's processes of a run. Every node is given the same overrides.
#
#   by hand, on each node:   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/node.sh model.path=... key=value ...
#   from an SSH host file:   launch/hosts.sh HOSTFILE key=value ...
#   inside a Slurm job:      srun --ntasks-per-node=1 launch/node.sh key=value ...
#
# PYTHON is the interpreter (python3); the other variables stand in dpo_dist/launcher/node.py.
# Settings of the network between ranks (NCCL_*, GLOO_*) are taken from the environment and from cluster.environment.
exec "${PYTHON:-python3}" -m dpo_dist.launcher.node "$@"
