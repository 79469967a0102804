#!/usr/bin/env bash
# Trains on this machine, one process a GPU:  launch/torchrun.sh model.path=... key=value ...   (PROCS_PER_NODE=4 for
# four processes)
set -euo pipefail
export NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29500}
exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
