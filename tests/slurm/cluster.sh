#!/bin/bash
# A real SLURM of eight nodes on this machine, for the tests: own configuration, key, socket and ports.
#
#   tests/slurm/cluster.sh start     install where missing (root, Debian or Ubuntu), configure, start, wait for idle nodes
#   tests/slurm/cluster.sh stop      end what start began, by its recorded process ids, and nothing else
#   tests/slurm/cluster.sh check     0 when it answers, 3 when it could be started, 4 when not; says why
#   eval "$(tests/slurm/cluster.sh env)"    point sbatch, squeue and scontrol of this shell at it
#
# Nothing of a SLURM that may be on the machine already is read, changed or stopped. TRIBUNAL_TEST_SLURM names its folder.
set -euo pipefail

dir=${TRIBUNAL_TEST_SLURM:-/tmp/tribunal-test-slurm-$(id -u)}
port=${TRIBUNAL_TEST_SLURM_PORT:-26820}
nodes=(n1 n2 n3 n4 n5 n6 n7 n8)
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf

missing() {
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || { echo "$program"; return; }
    done
}

answers() { [ -e "$SLURM_CONF" ] && timeout 10 scontrol ping 2>/dev/null | grep -q "is UP"; }

check() {
    if answers; then
        echo "running: $SLURM_CONF"
    elif [ -z "$(missing)" ]; then
        echo "not started"
        return 3
    elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "not installed ($(missing) is missing); start installs it"
        return 3
    else
        echo "$(missing) is missing and cannot be installed here: that takes root and apt-get (packages slurm-wlm and munge)"
        return 4
    fi
}

install_packages() {
    [ -n "$(missing)" ] || return 0
    check >/dev/null || [ $? = 3 ] || { check; exit 4; }
    apt-get update -qq
    # its services are not wanted: what the tests need is started below
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

configure() {
    mkdir -p "$dir"/{run,log,gpu,state} "${nodes[@]/#/$dir/spool.}"
    chmod 755 "$dir"
    local gpus="Name=gpu Count=4"
    if [ "$(id -u)" = 0 ]; then
        for i in 0 1 2 3; do [ -e "$dir/gpu/gpu$i" ] || mknod "$dir/gpu/gpu$i" c 1 3; done
        gpus="Name=gpu File=$dir/gpu/gpu[0-3]" # any device files will do: jobs get CUDA_VISIBLE_DEVICES
    fi
    echo "NodeName=n[1-8] $gpus" >"$dir/gres.conf"
    [ -e "$dir/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    cat >"$SLURM_CONF" <<CONF
ClusterName=tribunal
SlurmctldHost=localhost
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$port
AuthType=auth/munge
# A requeued job starts again after the credential's lifetime (120 s by default): 5 s keeps the tests short.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=5
MaxArraySize=1001
GresTypes=gpu
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
# slurmd may claim more CPUs and memory than the host has.
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-8] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 8))] CPUs=16 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=gpu Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=5
PartitionName=cpu Nodes=n[1-4] MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=5
# Tests run side by side: one that loses a node, or takes whole nodes from others, has nodes that the rest does not use.
PartitionName=frail Nodes=n[5-6] MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=5
# 'urgent' takes nodes from these two: a grace time with SIGTERM, then requeued by the controller, or ended for good
PartitionName=scavenge Nodes=n[7-8] MaxTime=INFINITE State=UP PreemptMode=REQUEUE GraceTime=20 PriorityTier=1
PartitionName=fleeting Nodes=n[7-8] MaxTime=INFINITE State=UP PreemptMode=CANCEL GraceTime=20 PriorityTier=1
PartitionName=urgent Nodes=n[7-8] MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=10
CONF
}

ours() { # process id from a pid file, if that process lives and was started with our folder
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; tr '\0' '\n' <"/proc/$pid/environ"; } 2>/dev/null | grep -q "$dir" || return 1
    echo "$pid"
}

wait_for() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}

# every node, once for each of its partitions
idle() { [ "$(timeout 10 sinfo -h -N -o '%N %t' 2>/dev/null | grep -cE ' (idle|mix|alloc)$')" -ge 16 ]; }

start_node() { ours "$dir/run/slurmd.$1.pid" >/dev/null || slurmd -N "$1"; }

start() {
    install_packages
    if answers && idle; then
        echo "running: $SLURM_CONF"
        return
    fi
    configure
    if ! ours "$dir/run/munged.pid" >/dev/null; then
        munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
            --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
    fi
    ours "$dir/run/slurmctld.pid" >/dev/null || slurmctld
    wait_for 30 answers || { tail -20 "$dir/log/slurmctld.log" >&2; echo "slurmctld does not answer" >&2; exit 1; }
    for node in "${nodes[@]}"; do start_node "$node"; done
    wait_for 60 idle || { sinfo -N -l >&2; echo "the nodes did not become idle" >&2; exit 1; }
    echo "started: $SLURM_CONF"
}

stop() {
    answers && scancel --user="$(id -un)" || true
    for file in "${nodes[@]/#/$dir/run/slurmd.}"; do end "$file.pid"; done
    end "$dir/run/slurmctld.pid"
    end "$dir/run/munged.pid"
}

end() {
    local pid
    pid=$(ours "$1") || return 0
    kill "$pid"
    wait_for 20 gone "$pid" || kill -9 "$pid"
}

gone() { ! grep -q '^State:.[^Z]' "/proc/$1/status" 2>/dev/null; } # a zombie that nobody waits for is gone too

case ${1-} in
start | stop | check) "$1" ;;
env) echo "export SLURM_CONF=$SLURM_CONF" ;;
start-node) start_node "$2" ;; # a node whose slurmd was ended
*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
