#!/usr/bin/env bash
# Trains on the machines of a host file, one name or address a line, the first being node 0:  launch/hosts.sh HOSTFILE
# key=value ... Every machine has this checkout, the data and run.dir at the same path. Ctrl-C saves and ends
# everywhere, twice ends at once.
#   REMOTE   how a command line is run on a host (ssh -o BatchMode=yes); called as  $REMOTE HOST COMMAND
#   PASS     names of variables that go along (those of launch/node.sh and PATH; add NCCL_... here)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] && [ -r "$1" ] || { echo "usage: launch/hosts.sh HOSTFILE key=value ..." >&2; exit 2; }
mapfile -t hosts < <(sed 's/#.*//' "$1" | awk 'NF { print $1 }')
shift
REMOTE=${REMOTE:-ssh -o BatchMode=yes}
RUN_DIR=${RUN_DIR:-$("${PYTHON:-python3}" -m dpo_dist.launcher.cli train "$@" --cfg run_dir)}
MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
NNODES=${#hosts[@]}
export RUN_DIR MASTER_ADDR NNODES

settings=
for name in RUN_DIR MASTER_ADDR NNODES MASTER_PORT PROCS_PER_NODE MODULE PYTHON PYTHONPATH OMP_NUM_THREADS PATH ${PASS:-}; do
    [ -z "${!name:-}" ] || settings+="$(printf '%s=%q ' "$name" "${!name}")"
done

# Nothing in a trap, nor in what it interrupts, is a $(...): bash 5.2 may fail to parse one there.
there=$(printf 'cd %q' "$PWD")
stop=$(printf '%s && read -r pid < %q/logs/node-NODE.pid && kill -s SIGNAL $pid' "$there" "$RUN_DIR")
pass_on() {         # a host that does not answer is not waited for
    for n in "${!hosts[@]}"; do
        one=${stop/NODE.pid/$n.pid}
        $REMOTE "${hosts[$n]}" "${one/SIGNAL/$1}" < /dev/null || true
    done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

command=$(printf '%q ' "$here/node.sh" "$@")
remotes=()
for i in "${!hosts[@]}"; do
    $REMOTE "${hosts[$i]}" "$there && env $settings NODE_RANK=$i $command" < /dev/null &
    remotes+=($!)
done
code=0
for remote in "${remotes[@]}"; do
    while kill -0 "$remote" 2>/dev/null; do wait "$remote" || true; done      # a signal ends a wait, too
    wait "$remote" || code=$?
done
exit "$code"
