#!/usr/bin/env bash
# The batch script of scripts/slurm_submit.py, which fills in what stands in double braces. Edit it for your cluster.
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

# Modules, proxies, settings of NCCL and the like belong here.
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

chunks={{CHUNKS}} # runs of this job, at most; the first has no SLURM_RESTART_COUNT
data=({{DATA}}) # to be copied to node-local storage: folders and files
staged={{STAGED}}

train() { # one task per GPU; where one fails, all end
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
        {{TRAINING}}
}

each_node() { # runs a command once on every node
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "$@"
}

stage() { # copies the data below $staged, into the same tree
    [ ${#data[@]} = 0 ] || each_node bash -c \
        'rm -rf "$0" && mkdir -p "$0" && cp -rL --parents "$@" "$0"' "$staged" "${data[@]}"
}

unstage() { # after scancel a job has no more steps: then at least here
    [ ${#data[@]} = 0 ] || each_node rm -rf "$staged" 2>/dev/null || rm -rf "$staged"
}

# SLURM sends SIGUSR2 before the time limit and SIGTERM on pre-emption to the tasks, which save and end. A SIGTERM may
# reach this script, too, which has yet to see how they ended.
trap : TERM
stage && train
status=$?
unstage

# Was the run cut short? Then it has saved and ended well (0), or it was too young to know SIGUSR2 (140) or, pre-empted,
# SIGTERM (143). Whatever else went wrong would go wrong again.
job=$(scontrol show job "$SLURM_JOB_ID")
log=$(sed -n 's/^ *StdOut=//p' <<<"$job")
grep -q '^done: ' "$log" && exit 0
case $status in
    0 | 140) ;;
    143) [[ $job =~ PreemptTime=[0-9] ]] || exit 143 ;;
    *) exit "$status" ;;
esac

# A job that scancel ended, or that SLURM requeues itself, is no longer running.
[[ $job =~ JobState=RUNNING|Reason=TimeLimit ]] || exit "$status"
if [ $((${SLURM_RESTART_COUNT:-0} + 1)) -lt "$chunks" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "all $chunks chunks are over; to go on, submit the same with --uid {{UID}} behind the --"
fi
