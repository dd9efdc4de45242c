#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for the tests: bash tests/slurm_cluster.sh install|start|stop FOLDER, as root.
# `install` fetches Debian's packages. All else that it writes is under FOLDER; SLURM_CONF=FOLDER/slurm.conf finds it.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

install() { # where it is not there
    type slurmctld slurmd munged && return
    command -v apt-get || { echo "there is no apt-get"; exit 1; }
    export DEBIAN_FRONTEND=noninteractive
    limits="-o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o DPkg::Lock::Timeout=60"
    packages="slurm-wlm munge"
    timeout 300 apt-get $limits install -qy --no-install-recommends $packages && return
    timeout 100 apt-get $limits update -q
    timeout 300 apt-get $limits install -qy --no-install-recommends $packages
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

configure() { # Two nodes whose names are this machine's, so that they can be looked up; short waits.
    host=$(hostname -s)
    cat >"$1/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool.%n
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.%n.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.%n.log
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$1/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=requeue_delay=1,sched_interval=5,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=2
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    mkdir -p "$1/state"
    chmod 755 "$1"
    configure "$1"
    (umask 077 && head -c 1024 /dev/urandom >"$1/munge.key")
    munged --force --socket="$1/munge.socket" --key-file="$1/munge.key" --seed-file="$1/munge.seed" \
        --pid-file="$1/munged.pid" --log-file="$1/munged.log"
    export SLURM_CONF=$1/slurm.conf
    slurmctld -c
    for node in "$(hostname -s)" localhost; do slurmd -c -N "$node"; done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --partition low --states idle | wc -l)" = 2 ] && return
        sleep 0.5
    done
    sinfo --Node --long
    exit 1
}

stop() { # jobs first, then the daemons, by the ids that they wrote down
    export SLURM_CONF=$1/slurm.conf
    for signal in TERM KILL; do
        jobs=$(timeout 5 squeue --noheader --format %i) && [ -n "$jobs" ] || break
        timeout 5 scancel --full --signal=$signal $jobs && timeout 5 scancel $jobs
        for _ in $(seq 20); do [ -n "$(timeout 5 squeue --noheader)" ] && sleep 0.5; done
    done
    for daemon in "$1"/slurmd.*.pid "$1"/slurmctld.pid "$1"/munged.pid; do
        [ -s "$daemon" ] && kill "$(cat "$daemon")" || true
    done
}

"$@"
