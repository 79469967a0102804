#!/usr/bin/env bash
# Trains on the machines of a host file, one name or address a line, the first being node 0:  launch/hosts.sh HOSTFILE
# key=value ... Every machine has this checkout, the data and run.dir at the same path. Ctrl-C saves and ends
# everywhere, twice ends at once. Where a node fails, all are started again from the last checkpoint, without the hosts
# that no longer answer.
#   REMOTE        how a command line is run on a host (ssh, which notices a lost host); called as  $REMOTE HOST COMMAND
#   PASS          names of variables that go along (those of launch/node.sh and PATH; add NCCL_... here)
#   MIN_NODES     hosts that it goes on with, at least (all)
#   MAX_RESTARTS  how often it is started again, at most, without a newer checkpoint in between (cluster.max_restarts)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] && [ -r "$1" ] || { echo "usage: launch/hosts.sh HOSTFILE key=value ..." >&2; exit 2; }
mapfile -t hosts < <(sed 's/#.*//' "$1" | awk 'NF { print $1 }')
shift
REMOTE=${REMOTE:-ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15}
cli() { "${PYTHON:-python3}" -m dpo_dist.launcher.cli train "$@"; }
RUN_DIR=${RUN_DIR:-$(cli "$@" --cfg run_dir)}
most=${MAX_RESTARTS:-$(cli "$@" --cfg job | sed -n '/^cluster:/,/^[^ ]/s/^  max_restarts: //p')}
least=${MIN_NODES:-${#hosts[@]}}
given_master=${MASTER_ADDR:-} first=${hosts[0]} MAX_RESTARTS=0      # of each node: all are started again together
export RUN_DIR MAX_RESTARTS
restart=
. "$here/restarts.sh"

# Nothing in a trap, nor in what it interrupts, is a $(...): bash 5.2 may fail to parse one there.
there=$(printf 'cd %q' "$PWD")
command=$(printf '%q ' "$here/node.sh" "$@")
stop=$(printf '%s && read -r pid < %q/logs/node-NODE.pid && kill -s SIGNAL $pid' "$there" "$RUN_DIR")
SECONDS_FOR_SURVIVORS=60                # of a node that failed, before they are ended at once

asked=()                                # the signals to pass on, in order
told=()                                 # how many of them each node has heard
trap 'asked+=(INT)' INT
trap 'asked+=(TERM)' TERM HUP

send() {                                # to node N the signal S
    local one=${stop/NODE.pid/$1.pid}
    $REMOTE "${hosts[$1]}" "${one/SIGNAL/$2}" < /dev/null 2> /dev/null
}
pass_on() {         # a node has no pid before it listens, so it is told until it has heard; a lost one is told in vain
    while [ "${told[$1]}" -lt ${#asked[@]} ] && send "$1" "${asked[${told[$1]}]}"; do
        told[$1]=$((told[$1] + 1))
    done
}

# all nodes, to their end; `code` is that of the first that failed
run_nodes() {
    local remotes=() i ended failed_at=
    code=0
    for i in "${!hosts[@]}"; do
        $REMOTE "${hosts[$i]}" "$there && env $settings NODE_RANK=$i $command" < /dev/null &
        remotes[i]=$! told[i]=0
    done
    while [ ${#remotes[@]} -gt 0 ]; do
        for i in "${!remotes[@]}"; do
            if kill -0 "${remotes[i]}" 2> /dev/null; then
                pass_on "$i"
                [ -n "$failed_at" ] && [ $((SECONDS - failed_at)) -gt $SECONDS_FOR_SURVIVORS ] || continue
                send "$i" INT && send "$i" INT || kill "${remotes[i]}" || true
            else
                ended=0
                wait "${remotes[i]}" || ended=$?
                [ $ended = 0 ] || failed_at=${failed_at:-$SECONDS}
                [ $code != 0 ] || code=$ended
                unset "remotes[i]"
            fi
        done
        sleep 0.3 || true
    done
}

while :; do
    MASTER_ADDR=${hosts[0]} NNODES=${#hosts[@]} settings=
    [ -z "$given_master" ] || [ "${hosts[0]}" != "$first" ] || MASTER_ADDR=$given_master
    export MASTER_ADDR NNODES
    for name in RUN_DIR MAX_RESTARTS MASTER_ADDR NNODES MASTER_PORT PROCS_PER_NODE MODULE PYTHON PYTHONPATH OMP_NUM_THREADS PATH ${PASS:-}; do
        [ -z "${!name:-}" ] || settings+="$(printf '%s=%q ' "$name" "${!name}")"
    done
    rm -f "$RUN_DIR/FAILED" "$RUN_DIR"/logs/node-*.pid           # of an earlier start
    run_nodes
    if [ $code = 0 ] || [ ${#asked[@]} -gt 0 ] || was_mistaken $code || ! again "$most"; then
        exit $code
    fi
    answering=()
    for host in "${hosts[@]}"; do
        if $REMOTE "$host" true < /dev/null; then answering+=("$host"); fi
    done
    if [ ${#answering[@]} -lt "$least" ]; then
        echo "error: ${#answering[@]} of ${#hosts[@]} hosts answer, and MIN_NODES is $least" >&2
        exit $code
    fi
    hosts=("${answering[@]}")
    echo "a node ended with code $code; $restart, on ${hosts[*]}" >&2
done
