#!/usr/bin/env bash
# Starts this node's processes of a run: torchrun with a static rendezvous. Every node is given the same overrides.
#
#   by hand, on each node:   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/node.sh model.path=... key=value ...
#   from an SSH host file:   launch/hosts.sh HOSTFILE key=value ...
#   inside a Slurm job:      srun --ntasks-per-node=1 launch/node.sh key=value ...
#
#   NNODES  NODE_RANK  MASTER_ADDR   how many nodes, which of them this is (from 0), and the name or address of node 0
#   MASTER_PORT                      a port that is free on node 0 (29500)
#   PROCS_PER_NODE                   processes on this node (one a GPU, or one)
#   MODULE                           what runs: dpo_dist.train, dpo_dist.score, ... (dpo_dist.train)
#   PYTHON                           the interpreter (python3)
#   RUN_DIR                          where logs go (what the overrides say)
# Settings of the network between ranks (NCCL_*, GLOO_*) are taken from the environment and from cluster.environment.
set -euo pipefail

ranks() { cat /proc/"$torchrun"/task/*/children 2>/dev/null; }

# Whether torchrun has come to its ranks, and not still waits for the other nodes: from then on it catches QUIT, the third signal.
begun() { (( 0x0$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$torchrun/status" 2>/dev/null) & 4 )); }

# The ranks save first and then end (dpo_dist/runtime/preemption.py); torchrun, which would kill them after 30 seconds, ignores these signals.
torchrun=none early='' interrupts=0
pass_on() {
    local number=$1 pids
    if [ "$torchrun" = none ]; then early=$1; return; fi
    if [ "$1" = INT ] && [ $((++interrupts)) -gt 1 ]; then number=KILL; fi
    until pids=$(ranks); [ -n "$pids" ]; do
        if [ "$number" = KILL ] || ! begun; then
            kill -s KILL "$torchrun" 2>/dev/null && echo "node $NODE_RANK: ended by $1 before its ranks had begun" >&2
            return 0
        fi
        sleep .1 || true                        # they are about to begin, or have just ended
    done
    for pid in $pids; do kill -s "$number" "$pid" 2>/dev/null || true; done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1

export PYTHON=${PYTHON:-python3}
NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)
PROCS_PER_NODE=${PROCS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
if [ -z "${MASTER_ADDR:-}" ]; then
    if [ "$NNODES" = 1 ]; then
        MASTER_ADDR=127.0.0.1
    elif [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    else
        echo "error: MASTER_ADDR is not set; set it to the name or address of node 0" >&2
        exit 2
    fi
fi
MASTER_PORT=${MASTER_PORT:-$((${SLURM_JOB_ID:-9500} % 10000 + 20000))}
RUN_DIR=${RUN_DIR:-$("$PYTHON" -m dpo_dist.launcher.cli train "$@" --cfg run_dir)}
mkdir -p "$RUN_DIR/logs"
log=$RUN_DIR/logs/node-$NODE_RANK.log
already=$(stat -c %s "$log" 2>/dev/null || echo 0)      # earlier starts have told theirs
echo $$ > "$RUN_DIR/logs/node-$NODE_RANK.pid"

export PYTHONUNBUFFERED=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=10
export PET_SIGNALS_TO_HANDLE=SIGQUIT TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT      # torchrun's names for it, newer and older
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > PROCS_PER_NODE ? $(nproc) / PROCS_PER_NODE : 1))}
(
    trap '' INT TERM HUP USR1
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCS_PER_NODE" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m "${MODULE:-dpo_dist.train}" "$@" 2>> "$log"
) &
torchrun=$!
[ -z "$early" ] || pass_on "$early"

while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" || true; done      # a signal ends a wait, too
code=0
wait "$torchrun" || code=$?
rm -f "$RUN_DIR/logs/node-$NODE_RANK.pid"
if [ "$code" != 0 ] && [ ! -e "$RUN_DIR/PREEMPTED" ]; then
    said=$(tail -c +$((already + 1)) "$log")
    grep '^error: ' <<< "$said" | tail -n 1 >&2 || tail -n 30 <<< "$said" >&2
    echo "error: node $NODE_RANK ($(hostname)) ended with code $code; its log is $log" >&2
fi
exit "$code"
