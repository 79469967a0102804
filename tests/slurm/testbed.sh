#!/usr/bin/env bash
# A real Slurm of N nodes on one machine. Root, and Debian's slurm-wlm, munge and iproute2.
#
#   testbed.sh up N      slurmctld here, and N nodes, each with its own network, host name, processes, IPC and mounts
#   testbed.sh kill I    power cut of node I;  testbed.sh boot I  power on
#   testbed.sh down      the end of it all
#
# State is in $STATE (a folder); then: export SLURM_CONF=$STATE/slurm.conf. TAG (few letters), NET (three numbers) and PORT keep several
# test beds apart. Partition `high` preempts `main`.
set -euo pipefail
: "${STATE:?}" "${TAG:=dpo}" "${NET:=10.77.0}" "${PORT:=6817}" "${CPUS:=4}"
bridge=br$TAG

up() {
    local nodes=$1 controller
    controller=$(hostname -s)
    mkdir -p "$STATE"/{log,pid,state}
    munge_up
    cat > "$STATE/slurm.conf" <<CONF
ClusterName=dev
SlurmctldHost=$controller($NET.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$STATE/state
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/pid/slurmctld.pid
SlurmdPidFile=$STATE/pid/slurmd.%n.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_resolution=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=30
KillWait=10
InactiveLimit=0
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=$CPUS RealMemory=8000 State=UNKNOWN
$(for i in $(seq "$nodes"); do echo "NodeName=node$i NodeAddr=$NET.$((10 + i))"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
    printf 'CgroupPlugin=cgroup/v1\n' > "$STATE/cgroup.conf"
    ip link add "$bridge" type bridge
    ip addr add "$NET.1/24" dev "$bridge"
    ip link set "$bridge" up
    # names from the hosts file only: an unreachable DNS server costs 10 s a look-up
    printf 'passwd: files\ngroup: files\nhosts: files\n' > "$STATE/nsswitch"
    : > "$STATE/resolv"
    { echo "127.0.0.1 localhost"; echo "$NET.1 $controller"; for i in $(seq "$nodes"); do echo "$NET.$((10 + i)) node$i"; done; } > "$STATE/hosts"
    SLURM_CONF=$STATE/slurm.conf slurmctld
    for i in $(seq "$nodes"); do boot "$i"; done
    for _ in $(seq 150); do
        [ "$(SLURM_CONF=$STATE/slurm.conf sinfo -h -p main -t idle -o %D 2>/dev/null)" = "$nodes" ] && return
        sleep .2
    done
    echo "the nodes did not come up; see $STATE/log" >&2
    return 1
}

munge_up() {      # without systemd
    munge -n 2>/dev/null | unmunge > /dev/null 2>&1 && return
    mkdir -p /run/munge /var/log/munge /var/lib/munge
    chown munge:munge /run/munge /var/log/munge /var/lib/munge
    chmod 755 /run/munge
    [ -s /etc/munge/munge.key ] || { (umask 077; head -c 1024 /dev/urandom > /etc/munge/munge.key); chown munge:munge /etc/munge/munge.key; }
    setpriv --reuid=munge --regid=munge --init-groups munged
    touch "$STATE/started-munge"
    for _ in $(seq 50); do munge -n 2>/dev/null | unmunge > /dev/null 2>&1 && return; sleep .1; done
}

boot() {
    local i=$1 node=node$1 space=$TAG-node$1
    if ! ip netns list | grep -qw "$space"; then
        ip netns add "$space"
        ip link add "ve$TAG$i" type veth peer name eth0 netns "$space"
        ip link set "ve$TAG$i" master "$bridge" up
        ip -n "$space" link set lo up
        ip -n "$space" addr add "$NET.$((10 + i))/24" dev eth0
        ip -n "$space" link set eth0 up
        ip -n "$space" route add default via "$NET.1"
    fi
    mkdir -p "$STATE/spool/$node"
    { grep -v " $node\$" "$STATE/hosts"; grep " $node\$" "$STATE/hosts"; } > "$STATE/hosts.$node"
    cat > "$STATE/init.$node" <<INIT
hostname $node
mount --bind $STATE/hosts.$node /etc/hosts
mount --bind $STATE/nsswitch /etc/nsswitch.conf
mount --bind $STATE/resolv /etc/resolv.conf
mount -t tmpfs tmpfs /dev/shm
export SLURM_CONF=$STATE/slurm.conf
unset STATE TAG NET PORT CPUS
slurmd -D -N $node < /dev/null >> $STATE/log/$node.console 2>&1 &
while :; do wait; sleep 1; done     # bash is the node's first process: it reaps orphans, and the node outlives its slurmd
INIT
    setsid nsenter --net="/run/netns/$space" unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc bash "$STATE/init.$node" \
        < /dev/null >> "$STATE/log/$node.console" 2>&1 &
    echo $! > "$STATE/pid/$node.unshare"
}

cut() {           # killing a process table's first process ends all of it at once
    local unshare
    unshare=$(cat "$STATE/pid/node$1.unshare" 2>/dev/null) || return 0
    # shellcheck disable=SC2046
    kill -9 $(cat "/proc/$unshare/task/$unshare/children" 2>/dev/null) "$unshare" 2>/dev/null || true
}

down() {
    shopt -s nullglob
    for init in "$STATE"/init.node*; do
        cut "${init##*.node}"
    done
    [ ! -s "$STATE/pid/slurmctld.pid" ] || kill "$(cat "$STATE/pid/slurmctld.pid")" || true
    sleep .5
    for init in "$STATE"/init.node*; do ip netns del "$TAG-${init##*.}" || true; done
    ip link del "$bridge" || true
    [ ! -e "$STATE/started-munge" ] || kill "$(cat /run/munge/munged.pid)" || true
}

case ${1:-} in
    up) up "$2" ;;
    boot) boot "$2" ;;
    kill) cut "$2" ;;
    down) down ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
