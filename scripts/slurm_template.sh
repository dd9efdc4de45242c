#!/usr/bin/env bash
# Template of a batch script: scripts/slurm_submit.py replaces the words in double braces. Edit the rest for your cluster.
#SBATCH --job-name={{JOB_NAME}}
#SBATCH --time={{TIME}}
#SBATCH --nodes={{NODES}}
#SBATCH --ntasks-per-node={{TASKS_PER_NODE}}
#SBATCH --cpus-per-task={{CPUS_PER_TASK}}
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@{{STOP_BEFORE}}
{{MORE_OPTIONS}}

# Add modules, proxies or settings of NCCL here.
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

chunks={{CHUNKS}} # largest number of times this job runs; the first time has no SLURM_RESTART_COUNT
data=({{DATA}}) # folders and files to copy to node-local storage
staged={{STAGED}}

train() { # one task per GPU; if one fails, all end
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
        {{TRAINING}}
}

each_node() { # runs a command once on every node
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "$@"
}

stage() { # copies the data into the folder $staged, with full paths
    [ ${#data[@]} = 0 ] || each_node bash -c \
        'rm -rf "$0" && mkdir -p "$0" && cp -rL --parents "$@" "$0"' "$staged" "${data[@]}"
}

unstage() { # after scancel srun fails: then deletes the copies on this node only
    [ ${#data[@]} = 0 ] || each_node rm -rf "$staged" 2>/dev/null || rm -rf "$staged"
}

# The tasks save and end when SLURM sends SIGUSR2 (before the time limit) or SIGTERM (pre-emption). This script ignores a SIGTERM
# of its own, as it must still see how the tasks ended.
trap : TERM
stage && train
status=$?
unstage

# A run that was stopped ends with status 0 after saving; or, in its first seconds, when it does not handle signals yet, with 140
# (SIGUSR2) or 143 (SIGTERM). Any other status is an error that a new attempt would only repeat.
job=$(scontrol show job "$SLURM_JOB_ID")
log=$(sed -n 's/^ *StdOut=//p' <<<"$job")
grep -q '^done: ' "$log" && exit 0
case $status in
    0 | 140) ;;
    143) [[ $job =~ PreemptTime=[0-9] ]] || exit 143 ;;
    *) exit "$status" ;;
esac

# Requeue only a running job: not one that scancel ended, nor one that SLURM requeues itself.
[[ $job =~ JobState=RUNNING|Reason=TimeLimit ]] || exit "$status"
if [ $((${SLURM_RESTART_COUNT:-0} + 1)) -lt "$chunks" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "all $chunks chunks are over; to go on, submit the same command with --uid {{UID}} after the --"
fi
